//! ACPI tables, built from the configuration by `acpi_tables`.

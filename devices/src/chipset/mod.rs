//! The chipset: ICH9-style power management, RTC/CMOS, i8042, reset, serial port.

//! The contract: configuration schema, routes, OpenAPI, server, client and `rackctl`. Knows no KVM.

//! `vnet-controlplane`: flags to configuration to a running controlplane; errors to exit codes; nothing else.

fn main() {}

//! `vnet-dataplane`: flags to configuration to a running dataplane; errors to exit codes; nothing else.

fn main() {}

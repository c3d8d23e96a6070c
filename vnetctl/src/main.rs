//! `vnetctl`: flags to configuration to a running command; errors to exit codes; nothing else.

fn main() {}

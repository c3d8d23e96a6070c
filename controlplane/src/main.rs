//! `vnet-controlplane`: flags to configuration to a running controlplane; errors to exit codes; nothing else.

use std::process::ExitCode;

use clap::Parser as _;
use vnet_controlplane::Args;

fn main() -> ExitCode {
    vnet_controlplane::main(Args::parse())
}

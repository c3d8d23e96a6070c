//! `vnet-dataplane`: flags to configuration to a running dataplane; errors to exit codes; nothing else.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    vnet_dataplane::main(vnet_dataplane::args::Cli::parse().args)
}

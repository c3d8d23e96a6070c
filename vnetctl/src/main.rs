//! `vnetctl`: arguments to a role or a command, errors to exit codes; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    vnetctl::launch::role(&arguments).unwrap_or_else(|| vnetctl::cli::main(arguments).into())
}

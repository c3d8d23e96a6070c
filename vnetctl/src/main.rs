//! `vnetctl`: arguments to a role or a command, errors to exit codes; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(code) = vnetctl::launch::role(&arguments) {
        return code;
    }
    if vnetctl::gvproxy::program::is_called(&arguments) {
        return vnetctl::gvproxy::program::main(&arguments);
    }
    vnetctl::cli::main(arguments).into()
}

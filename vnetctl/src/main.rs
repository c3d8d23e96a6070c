//! `vnetctl`: flags to configuration to a running command; errors to exit codes; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else: the guest's helper must still be a single thread.
    #[cfg(target_os = "linux")]
    if let Some(code) = vnetctl::sandbox::dispatch(std::env::args_os()) {
        return code;
    }
    ExitCode::SUCCESS
}

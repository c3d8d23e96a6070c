//! `vnet-dataplane`: flags to configuration to a running dataplane; errors to exit codes; nothing else.

fn main() -> std::process::ExitCode {
    vnet_dataplane::run::main(std::env::args_os())
}

//! d
use crate::failure::Failure;
/// Arguments of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  vnetctl demo")]
pub struct DemoArgs {}
/// x
/// # Errors
/// x
pub fn execute(_: DemoArgs) -> Result<(), Failure> {
    Ok(())
}

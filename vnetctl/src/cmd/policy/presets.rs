//! `policy presets`: the sets of rules that come with this program.

use clap::Args;

use crate::cmd::Context;
use crate::failure::Failure;
use crate::launch::presets::{self, Preset};

/// Arguments of `policy presets`.
#[derive(Debug, Args)]
pub struct PresetsArgs {
    /// The preset to print, as a policy file; without it, what there is
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// Lists them, or prints one.
///
/// # Errors
/// For a name that none has.
pub(super) fn execute(args: &PresetsArgs, context: &mut Context) -> Result<(), Failure> {
    match &args.name {
        Some(name) => context.output.write(presets::find(name)?.document),
        None => {
            let line = |preset: &Preset| format!("{:<8}  {}\n", preset.name, preset.about());
            let lines: String = presets::ALL.iter().map(line).collect();
            context.output.write(&lines)
        }
    }
}

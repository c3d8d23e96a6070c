//! `policy presets`: the sets of rules that come with this program.

use clap::Args;
use vnet_proto::v1;

use crate::cmd::Context;
use crate::failure::Failure;
use crate::launch::presets::{self, Preset};
use crate::output::{Format, Row};

/// Arguments of `policy presets`.
#[derive(Debug, Args)]
pub struct PresetsArgs {
    /// The preset to print, as a policy file; without it, what there is
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// Lists them, or prints one: for programs as policies with their documents, as `policy show` does.
///
/// # Errors
/// For a name that none has.
pub(super) fn execute(args: &PresetsArgs, context: &mut Context) -> Result<(), Failure> {
    let output = &mut context.output;
    match (&args.name, output.format()) {
        (Some(name), Format::Table) => output.write(presets::find(name)?.document),
        (Some(name), _) => {
            let policy = policy(&presets::find(name)?);
            output.one(v1::Policy::NAME, &policy, Vec::new)
        }
        (None, Format::Table) => {
            let line = |preset: &Preset| format!("{:<8}  {}\n", preset.name, preset.about());
            let lines: String = presets::ALL.iter().map(line).collect();
            output.write(&lines)
        }
        (None, _) => {
            let all: Vec<v1::Policy> = presets::ALL.iter().map(policy).collect();
            output.list(&all)
        }
    }
}

fn policy(preset: &Preset) -> v1::Policy {
    v1::Policy {
        name: preset.name.to_owned(),
        document: preset.document.to_owned(),
        ..Default::default()
    }
}

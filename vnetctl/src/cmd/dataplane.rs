//! `dataplane verify`: whether what dataplanes have cached is what is decided.

use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use super::select::ListVmArgs;
use crate::client::unhurried;
use crate::failure::Failure;
use crate::output::text::safe;
use crate::output::{self, Format, Row, words};

/// Verbs of `dataplane`.
#[derive(Debug, Subcommand)]
pub enum DataplaneCommand {
    /// Decide anew what dataplanes have cached, at points drawn inside each verdict's match
    #[command(
        long_about = "Decide anew what dataplanes have cached.\n\n\
            A cached verdict answers for everything inside its match. Points drawn there are put to the policy in \
            force; every difference is an error of vnet's, and makes this command fail.",
        after_help = "Examples:\n  vnetctl dataplane verify\n  vnetctl dataplane verify --vm web --points 100 --seed 7"
    )]
    Verify(VerifyArgs),
}

/// Arguments of `dataplane verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Which VMs' caches.
    #[command(flatten)]
    pub vms: ListVmArgs,
    /// What the points are drawn by; another each time if left out
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Points drawn in each match
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub points: u32,
}

impl DataplaneCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses, differences, and dataplanes that do not answer.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let Self::Verify(args) = self;
        let client = context.connection.open().await?;
        let request = v1::VerifyVerdictsRequest {
            vms: args.vms.message(),
            seed: args.seed,
            points: args.points,
        };
        let answer = client
            .flows()
            .verify_verdicts(unhurried(request))
            .await?
            .into_inner();
        if context.output.format() == Format::Table {
            if !answer.mismatches.is_empty() {
                context.output.list(&answer.mismatches)?;
            }
            output::say(summary(&answer));
        } else {
            context
                .output
                .one("vnet.v1.VerifyVerdictsResponse", &answer, Vec::new)?;
        }
        if answer.mismatches_in_all > 0 {
            return Err(Failure::Failed(format!(
                "{} points are not decided as they are cached; please report it, with --seed {}",
                answer.mismatches_in_all, answer.seed
            )));
        }
        if !answer.vms_silent.is_empty() {
            let names = safe(&answer.vms_silent.join(", ")).into_owned();
            return Err(Failure::Failed(format!(
                "the dataplanes of these VMs did not answer: {names}"
            )));
        }
        Ok(())
    }
}

fn summary(answer: &v1::VerifyVerdictsResponse) -> String {
    let mut line = format!(
        "{} verdicts of {} VMs decided anew at {} points (seed {}): {} differ",
        answer.verdicts, answer.vms, answer.points, answer.seed, answer.mismatches_in_all
    );
    if answer.outdated > 0 {
        line.push_str(&format!("; {} were void meanwhile", answer.outdated));
    }
    if answer.left_out > 0 {
        line.push_str(&format!(
            "; {} were left out, being too many or unreadable",
            answer.left_out
        ));
    }
    line
}

impl Row for v1::VerdictMismatch {
    const NAME: &'static str = "vnet.v1.VerdictMismatch";
    const COLUMNS: &'static [&'static str] = &["VM", "MATCH", "POINT", "CACHED", "DECIDED", "BECAUSE"];

    fn cells(&self, _: SystemTime) -> Vec<String> {
        let said = |action, would_deny| {
            let observed = if would_deny { " (observed)" } else { "" };
            format!("{}{observed}", words::action(action))
        };
        vec![
            self.vm.clone(),
            self.r#match.clone(),
            self.point.clone(),
            said(self.cached, self.cached_would_deny),
            said(self.decided, self.decided_would_deny),
            words::reason(self.reason.as_ref()),
        ]
    }
}

//! `policy diff` and `policy suggest`: what the history says of a policy that is not in force.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;
use vnet_proto::model::Mode;
use vnet_proto::v1;

use crate::client::unhurried;
use crate::cmd::Context;
use crate::cmd::select::{ListVmArgs, duration};
use crate::failure::{EXIT_DIFFERS, Failure};
use crate::launch;
use crate::output::text::safe;
use crate::output::{self, Format, Row, text, words};

/// Which part of the history.
#[derive(Debug, Args)]
pub struct SpanArgs {
    /// Which VMs.
    #[command(flatten)]
    pub vms: ListVmArgs,
    /// Only of the last so long, as 90s, 10m, 1h or 2days
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub since: Option<Duration>,
}

/// Arguments of `policy diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The policy file; `-` is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Which history.
    #[command(flatten)]
    pub span: SpanArgs,
    /// Decide in this mode: enforce, ask, observe or block; the file's own if left out
    #[arg(long, value_name = "MODE")]
    pub mode: Option<Mode>,
}

/// Arguments of `policy suggest`.
#[derive(Debug, Args)]
pub struct SuggestArgs {
    /// Which history.
    #[command(flatten)]
    pub span: SpanArgs,
    /// From people's answers rather than from traffic
    #[arg(long)]
    pub from_grants: bool,
}

impl SpanArgs {
    fn time(&self, now: SystemTime) -> Option<v1::TimeRange> {
        self.since.map(|since| v1::TimeRange {
            start: now.checked_sub(since).map(prost_types::Timestamp::from),
            end: None,
        })
    }
}

/// Replays the history against a file.
///
/// # Errors
/// What is wrong with the file, what the controlplane refuses, and [`EXIT_DIFFERS`] where something would be
/// decided otherwise.
pub(super) async fn diff(args: DiffArgs, context: &mut Context) -> Result<(), Failure> {
    let document = launch::read_document(&args.file)?;
    // Told here, a problem is told with its excerpt, and without a server.
    launch::check_document(&document)?;
    let client = context.connection.open().await?;
    let request = v1::DiffPolicyRequest {
        document: document.text,
        source: document.source,
        lists: document.lists,
        vms: args.span.vms.message(),
        time: args.span.time(context.output.now()),
        mode: args.mode.map_or(v1::Mode::Unspecified, Into::into).into(),
    };
    let answer = client
        .policy()
        .diff_policy(unhurried(request))
        .await?
        .into_inner();
    if context.output.format() == Format::Table {
        if !answer.changes.is_empty() {
            context.output.list(&answer.changes)?;
        }
        let changed: u64 = answer.changes.iter().map(|change| change.count).sum();
        if answer.changes_left_off > 0 {
            output::say(format!(
                "and {} more kinds of change, which are not listed; narrow it with --vm or --since",
                answer.changes_left_off
            ));
        }
        output::say(replayed(answer.replay.as_ref(), &would_change(changed)));
    } else {
        context
            .output
            .one("vnet.v1.DiffPolicyResponse", &answer, Vec::new)?;
    }
    if answer.changes.is_empty() {
        Ok(())
    } else {
        Err(Failure::Code(EXIT_DIFFERS))
    }
}

fn would_change(changed: u64) -> String {
    match changed {
        0 => "nothing would be decided otherwise".to_owned(),
        n => format!("{n} would be decided otherwise"),
    }
}

/// Writes a policy of what was recorded.
///
/// # Errors
/// What the controlplane refuses.
pub(super) async fn suggest(args: SuggestArgs, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let request = v1::SuggestRequest {
        vms: args.span.vms.message(),
        time: args.span.time(context.output.now()),
        from_grants: args.from_grants,
    };
    let answer = client.policy().suggest(unhurried(request)).await?.into_inner();
    if context.output.format() != Format::Table {
        return context.output.one("vnet.v1.SuggestResponse", &answer, Vec::new);
    }
    // The words go to stderr, so that `policy suggest > policy.yaml` is the document and nothing else.
    context.output.write(&answer.document)?;
    if args.from_grants {
        output::say(format!("made from {} grants", answer.grants));
        return Ok(());
    }
    let changed: u64 = answer.changes.iter().map(|change| change.count).sum();
    output::say(replayed(answer.replay.as_ref(), &would_change(changed)));
    for change in &answer.changes {
        let line = format!(
            "  {} {}: {} -> {}, since it was decided in several ways",
            change.vm,
            words::target(change.target.as_ref()),
            words::action(change.before),
            words::action(change.after),
        );
        output::say(safe(&line));
    }
    Ok(())
}

/// `replayed 12 flows, 3 lookups and 1 question; nothing would be decided otherwise (left out: ...)`.
fn replayed(replay: Option<&v1::Replay>, result: &str) -> String {
    let replay = replay.cloned().unwrap_or_default();
    let count = |n: u64, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let left_out: Vec<String> = replay
        .left_out
        .iter()
        .map(|left| format!("{} {}", left.count, safe(&left.text)))
        .collect();
    let left_out = match left_out.is_empty() {
        true => String::new(),
        false => format!("; left out: {}", left_out.join(", ")),
    };
    format!(
        "replayed {}, {} and {}: {result}{left_out}",
        count(replay.flows, "flow"),
        count(replay.lookups, "lookup"),
        count(replay.questions, "question"),
    )
}

impl Row for v1::VerdictChange {
    const NAME: &'static str = "vnet.v1.VerdictChange";
    const COLUMNS: &'static [&'static str] = &[
        "VM", "WHAT", "NAMES", "COUNT", "LAST", "WAS", "BY", "WOULD BE", "BY",
    ];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        vec![
            self.vm.clone(),
            words::target(self.target.as_ref()),
            text::or_none(self.names.join(",")),
            self.count.to_string(),
            text::age(now, self.last_at.as_ref()),
            words::action(self.before),
            words::reason_short(self.before_reason.as_ref()),
            words::action(self.after),
            words::reason_short(self.after_reason.as_ref()),
        ]
    }
}

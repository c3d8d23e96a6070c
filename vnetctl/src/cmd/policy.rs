//! `policy`: the documents that decide. What the history says of them is in `history`, what comes with this
//! program in `presets`.

mod history;
mod presets;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use vnet_proto::model::Target;
use vnet_proto::v1;

pub use self::history::{DiffArgs, SuggestArgs};
pub use self::presets::PresetsArgs;
use super::Context;
use super::select::{duration, vm_name};
use crate::client::{PAGE_SIZE, pages, unary};
use crate::failure::Failure;
use crate::launch;
use crate::output::text::safe;
use crate::output::{self, Format, Row, text, words};

/// Verbs of `policy`.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Check a policy file whole and report every problem; nothing is applied and no server is asked
    #[command(after_help = "Examples:\n  vnetctl policy check policy.yaml")]
    Check(CheckArgs),
    /// Run the tests inside a policy file; nothing is applied and no server is asked
    #[command(after_help = "Examples:\n  vnetctl policy test policy.yaml")]
    Test(CheckArgs),
    /// Print the JSON Schema of policy files, by which editors complete and check them
    #[command(after_help = "Examples:\n  vnetctl policy schema > policy.schema.json")]
    Schema,
    /// Print a policy in force, or one of its revisions
    #[command(
        after_help = "Examples:\n  vnetctl policy show\n  vnetctl policy show --revision 3 > policy.yaml"
    )]
    Show(ShowArgs),
    /// Put a policy file in force as the next revision
    #[command(
        long_about = "Put a policy file in force as the next revision.\n\n\
            A file with any error changes nothing. Live flows that the new revision does not allow are cut.",
        after_help = "Examples:\n  vnetctl policy apply policy.yaml\n  vnetctl policy apply policy.yaml --dry-run\n  \
            vnetctl policy apply build.yaml --name build\n  vnetctl policy apply policy.yaml --confirm-within 60s"
    )]
    Apply(ApplyArgs),
    /// Let a revision that was applied with --confirm-within stay
    #[command(after_help = "Examples:\n  vnetctl policy confirm\n  vnetctl policy confirm --revision 4")]
    Confirm(ConfirmArgs),
    /// List what a policy file would decide otherwise than it was, of what is recorded; exit code 3 if anything
    #[command(
        long_about = "List what a policy file would decide otherwise than it was, of what is recorded.\n\n\
            Recorded flows, lookups and questions are put to the file, as it would decide alone; people's answers \
            stay as they were given. Exit code 0: nothing differs; 3: something does.",
        after_help = "Examples:\n  vnetctl policy diff policy.yaml\n  \
            vnetctl policy diff policy.yaml --since 24h --vm web -o json"
    )]
    Diff(DiffArgs),
    /// Write a policy file of what was recorded, or of people's answers
    #[command(
        long_about = "Write a policy file of what was recorded, or of people's answers.\n\n\
            It allows what was let through and nothing else, by names where they are known. Run what it is for in \
            mode observe first. The same history, replayed against it, comes out as it was.",
        after_help = "Examples:\n  vnetctl policy suggest --since 1h --vm web > policy.yaml\n  \
            vnetctl policy suggest --from-grants --since 24h > answers.yaml"
    )]
    Suggest(SuggestArgs),
    /// List the sets of rules that come with this program, or print one as a policy file
    #[command(after_help = "Examples:\n  vnetctl policy presets\n  vnetctl policy presets npm > npm.yaml")]
    Presets(PresetsArgs),
    /// Say what would be decided for a destination, and why
    #[command(after_help = "Examples:\n  vnetctl policy explain tcp 192.0.2.7:443\n  \
        vnetctl policy explain --vm web domain example.com")]
    Explain(ExplainArgs),
    /// List a policy's revisions, newest first
    #[command(after_help = "Examples:\n  vnetctl policy revisions")]
    Revisions(NameArgs),
    /// Put an earlier revision in force again, as a new revision
    #[command(after_help = "Examples:\n  vnetctl policy rollback\n  vnetctl policy rollback 3")]
    Rollback(RollbackArgs),
}

/// Arguments of `policy check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The policy file; `-` is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Which policy.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The policy's name
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub name: String,
}

/// Arguments of `policy show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Which policy.
    #[command(flatten)]
    pub name: NameArgs,
    /// A revision's number; that in force if left out
    #[arg(long, value_name = "N")]
    pub revision: Option<u64>,
}

/// Arguments of `policy apply`.
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The policy file; `-` is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Which policy.
    #[command(flatten)]
    pub name: NameArgs,
    /// Only check it against what is in force
    #[arg(long)]
    pub dry_run: bool,
    /// Refuse unless this is the etag of the policy in force
    #[arg(long, value_name = "ETAG")]
    pub etag: Option<String>,
    /// Roll it back by itself unless `policy confirm` comes within this time, as 60s or 10m
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "dry_run")]
    pub confirm_within: Option<Duration>,
}

/// Arguments of `policy confirm`.
#[derive(Debug, Args)]
pub struct ConfirmArgs {
    /// Which policy.
    #[command(flatten)]
    pub name: NameArgs,
    /// Refuse unless this is the revision that awaits it
    #[arg(long, value_name = "N")]
    pub revision: Option<u64>,
}

/// Arguments of `policy explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// `tcp|udp|icmp|icmpv6 ADDRESS[:PORT]`, `domain NAME` or `lookup NAME`
    #[arg(value_name = "DESTINATION", required = true)]
    pub words: Vec<String>,
    /// The VM; may be left out where there is only one
    #[arg(long, value_name = "NAME", value_parser = vm_name)]
    pub vm: Option<String>,
}

/// Arguments of `policy rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The revision to return to; the one before if left out
    #[arg(value_name = "REVISION")]
    pub revision: Option<u64>,
    /// Which policy.
    #[command(flatten)]
    pub name: NameArgs,
}

impl PolicyCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What is wrong with a file, and what the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        match self {
            Self::Check(args) => check(&args, context),
            Self::Test(args) => test(&args, context),
            Self::Schema => context.output.write(&launch::policy_schema()),
            Self::Show(args) => show(args, context).await,
            Self::Apply(args) => apply(args, context).await,
            Self::Confirm(args) => confirm(args, context).await,
            Self::Diff(args) => history::diff(args, context).await,
            Self::Suggest(args) => history::suggest(args, context).await,
            Self::Presets(args) => presets::execute(&args, context),
            Self::Explain(args) => explain(args, context).await,
            Self::Revisions(NameArgs { name }) => revisions(name, context).await,
            Self::Rollback(args) => rollback(args, context).await,
        }
    }
}

fn check(args: &CheckArgs, context: &mut Context) -> Result<(), Failure> {
    let document = launch::read_document(&args.file)?;
    let warnings = launch::check_document(&document)?;
    let answer = v1::ApplyPolicyResponse {
        policy: Some(v1::Policy {
            document: document.text,
            source: document.source.clone(),
            ..Default::default()
        }),
        warnings: warnings.clone(),
        cut: None,
    };
    context.output.done(APPLIED, &answer, || {
        format!("{} is a valid policy", document.source)
    })?;
    warn(context, &document.source, &warnings);
    Ok(())
}

fn test(args: &CheckArgs, context: &mut Context) -> Result<(), Failure> {
    let document = launch::read_document(&args.file)?;
    let tested = launch::test_document(&document)?;
    let source = safe(&document.source).into_owned();
    if tested == 0 {
        let text = format!("{source} has no tests; add tests: with what it must allow, deny and ask");
        return Err(Failure::Failed(text));
    }
    context.output.write(&format!(
        "{source}: {tested} destinations come out as its tests say\n"
    ))
}

async fn show(args: ShowArgs, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let request = v1::GetPolicyRequest {
        name: args.name.name,
        revision: args.revision.unwrap_or_default(),
    };
    let policy = client
        .policy()
        .get_policy(unary(request))
        .await?
        .into_inner()
        .policy
        .unwrap_or_default();
    if context.output.format() != Format::Table {
        return context.output.one(v1::Policy::NAME, &policy, Vec::new);
    }
    // The words go to stderr, so that `policy show > policy.yaml` is the document and nothing else.
    output::say(safe(&header(&policy, context.output.now())));
    let mut document = policy.document.lines().map(safe).collect::<Vec<_>>().join("\n");
    if !document.is_empty() {
        document.push('\n');
    }
    context.output.write(&document)
}

fn header(policy: &v1::Policy, now: SystemTime) -> String {
    let decides = format!(
        "mode {}, default {}",
        words::mode(policy.mode),
        words::action(policy.default_action)
    );
    if policy.withdrawn {
        return format!(
            "policy {}, revision {}: withdrawn {} ago by {}; {decides}",
            policy.name,
            policy.revision,
            text::age(now, policy.applied_at.as_ref()),
            text::or_none(policy.applied_by.as_str()),
        );
    }
    if policy.revision == 0 {
        return format!("policy {}: built in, no file was applied; {decides}", policy.name);
    }
    let awaits = match &policy.confirm_until {
        Some(_) => format!(
            "; goes in {} unless confirmed",
            text::remaining(now, policy.confirm_until.as_ref())
        ),
        None => String::new(),
    };
    format!(
        "policy {}, revision {}, applied {} ago by {} from {}; {decides}{awaits}",
        policy.name,
        policy.revision,
        text::age(now, policy.applied_at.as_ref()),
        text::or_none(policy.applied_by.as_str()),
        text::or_none(policy.source.as_str()),
    )
}

async fn apply(args: ApplyArgs, context: &mut Context) -> Result<(), Failure> {
    let document = launch::read_document(&args.file)?;
    // Told here, a problem is told with its excerpt, and without a server.
    launch::check_document(&document)?;
    let client = context.connection.open().await?;
    let request = v1::ApplyPolicyRequest {
        name: args.name.name,
        document: document.text,
        source: document.source.clone(),
        etag: args.etag.unwrap_or_default(),
        validate_only: args.dry_run,
        confirm_within: args
            .confirm_within
            .and_then(|within| prost_types::Duration::try_from(within).ok()),
        lists: document.lists,
    };
    let answer = client.policy().apply_policy(unary(request)).await?.into_inner();
    context.output.done(APPLIED, &answer, || {
        let policy = answer.policy.clone().unwrap_or_default();
        if args.dry_run {
            format!(
                "{} would be accepted as policy {}; nothing was changed",
                document.source, policy.name
            )
        } else {
            let cut = words::cut(answer.cut.as_ref());
            let awaits = match args.confirm_within {
                Some(within) => format!(
                    "; it goes in {} unless this comes: vnetctl policy confirm{}",
                    text::span(within),
                    of_policy(&policy.name)
                ),
                None => String::new(),
            };
            format!(
                "policy {} is at revision {}{cut}{awaits}",
                policy.name, policy.revision
            )
        }
    })?;
    warn(context, &document.source, &answer.warnings);
    Ok(())
}

fn of_policy(name: &str) -> String {
    match name {
        "default" => String::new(),
        name => format!(" --name {name}"),
    }
}

async fn confirm(args: ConfirmArgs, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let request = v1::ConfirmPolicyRequest {
        name: args.name.name,
        revision: args.revision.unwrap_or_default(),
    };
    let answer = client.policy().confirm_policy(unary(request)).await?.into_inner();
    context.output.done("vnet.v1.ConfirmPolicyResponse", &answer, || {
        let policy = answer.policy.clone().unwrap_or_default();
        format!("revision {} of policy {} stays", policy.revision, policy.name)
    })
}

async fn explain(args: ExplainArgs, context: &mut Context) -> Result<(), Failure> {
    let target = Target::from_words(&args.words).map_err(|e| Failure::Usage(e.to_string()))?;
    let client = context.connection.open().await?;
    let request = v1::ExplainRequest {
        vm: args.vm.unwrap_or_default(),
        target: Some((&target).into()),
    };
    let answer = client.policy().explain(unary(request)).await?.into_inner();
    context.output.one("vnet.v1.ExplainResponse", &answer, || {
        let guards: Vec<String> = answer.guards.iter().map(|g| words::guard(*g)).collect();
        let mut lines = vec![
            ("Answer", words::action(answer.action)),
            ("Because", words::reason(answer.reason.as_ref())),
            (
                "Policy",
                format!(
                    "{} (revision {})",
                    text::or_none(answer.policy.as_str()),
                    answer.revision
                ),
            ),
            ("Same for", text::or_none(answer.r#match.as_str())),
            ("Names", text::or_none(answer.names.join(", "))),
            ("Guards", text::or_none(guards.join(", "))),
        ];
        if !answer.peer_vm.is_empty() {
            lines.push(("Address of", answer.peer_vm.clone()));
        }
        if !answer.remedy.is_empty() {
            lines.push(("To change it", answer.remedy.clone()));
        }
        lines
    })
}

async fn revisions(name: String, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let revisions = pages(|page_token| {
        let mut service = client.policy();
        let page_size = PAGE_SIZE.min(REVISIONS_PAGE_MAX);
        let request = v1::ListRevisionsRequest {
            name: name.clone(),
            page_size,
            page_token,
        };
        async move {
            let page = service.list_revisions(unary(request)).await?.into_inner();
            Ok((page.revisions, page.next_page_token))
        }
    })
    .await?;
    context.output.list(&revisions)
}

async fn rollback(args: RollbackArgs, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let request = v1::RollbackRequest {
        name: args.name.name,
        revision: args.revision.unwrap_or_default(),
    };
    let answer = client.policy().rollback(unary(request)).await?.into_inner();
    context.output.done("vnet.v1.RollbackResponse", &answer, || {
        let policy = answer.policy.clone().unwrap_or_default();
        format!(
            "policy {} is at revision {}{}",
            policy.name,
            policy.revision,
            words::cut(answer.cut.as_ref())
        )
    })
}

impl Row for v1::Policy {
    const NAME: &'static str = "vnet.v1.Policy";
    const COLUMNS: &'static [&'static str] = &[
        "NAME", "REVISION", "APPLIED", "BY", "SOURCE", "MODE", "DEFAULT", "NOTE",
    ];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        let until = self.confirm_until.as_ref();
        // One that was followed by another was not confirmed, whatever its time says.
        let awaits = until.filter(|until| SystemTime::try_from(**until).is_ok_and(|until| until > now));
        let note = match awaits {
            _ if self.withdrawn => "withdrawn".to_owned(),
            Some(_) => format!("goes in {} unless confirmed", text::remaining(now, until)),
            None if until.is_some() => "not confirmed".to_owned(),
            None => text::NONE.to_owned(),
        };
        vec![
            self.name.clone(),
            self.revision.to_string(),
            text::time(self.applied_at.as_ref()),
            text::or_none(self.applied_by.as_str()),
            text::or_none(self.source.as_str()),
            words::mode(self.mode),
            words::action(self.default_action),
            note,
        ]
    }
}

/// Says on stderr what a reader of the document should know; programs read it in the message.
fn warn(context: &Context, source: &str, warnings: &[v1::PolicyWarning]) {
    if context.output.format() == Format::Table {
        for line in launch::warning_lines(source, warnings) {
            output::say(line);
        }
    }
}

const APPLIED: &str = "vnet.v1.ApplyPolicyResponse";
const REVISIONS_PAGE_MAX: u32 = 500;

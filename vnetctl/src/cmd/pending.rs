//! `pending list|show|watch`: what is held and waits for a person.

use std::collections::HashMap;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use super::select::ListVmArgs;
use crate::client::{Client, PAGE_SIZE, pages, unary};
use crate::failure::Failure;
use crate::output::{self, Row, text, words};

/// Verbs of `pending`.
#[derive(Debug, Subcommand)]
pub enum PendingCommand {
    /// List the requests that await an answer, oldest first, those of one registrable domain together
    #[command(after_help = "Examples:\n  vnetctl pending list\n  vnetctl pending list --vm web -o json")]
    List(ListVmArgs),
    /// Show one request, open or lately answered, and what each answer to it would cover
    #[command(
        after_help = "Examples:\n  vnetctl pending show \"$(vnetctl pending list -o json | jq -r '.[0].id')\""
    )]
    Show(ShowArgs),
    /// Print requests as they are opened, change and end, until interrupted
    #[command(
        after_help = "Examples:\n  vnetctl pending watch\n  vnetctl pending watch -o json | jq .request.id"
    )]
    Watch(ListVmArgs),
}

/// Arguments of `pending show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The id, or a beginning of it of at least four characters
    #[arg(value_name = "ID")]
    pub id: String,
}

impl PendingCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let client = context.connection.open().await?;
        match self {
            Self::List(vms) => {
                let mut requests = open_requests(&client, vms.message()).await?;
                if context.output.format() == output::Format::Table {
                    together(&mut requests);
                }
                context.output.list(&requests)
            }
            Self::Show(ShowArgs { id }) => {
                let answer = client
                    .pending()
                    .get_pending(unary(v1::GetPendingRequest { id }))
                    .await?;
                let request = answer.into_inner().request.unwrap_or_default();
                let now = context.output.now();
                context
                    .output
                    .one(v1::PendingRequest::NAME, &request, || details(&request, now))
            }
            Self::Watch(vms) => {
                let request = v1::WatchPendingRequest { vms: vms.message() };
                let mut changes = client.pending().watch_pending(request).await?.into_inner();
                context.output.stream_header(WATCH)?;
                while let Some(change) = changes.message().await? {
                    watch_line(context, &change)?;
                }
                Err(Failure::Failed("the controlplane ended the watch".to_owned()))
            }
        }
    }
}

/// The open requests of these VMs, oldest first.
///
/// # Errors
/// What the controlplane refuses.
pub(crate) async fn open_requests(
    client: &Client,
    vms: Option<v1::VmSelector>,
) -> Result<Vec<v1::PendingRequest>, Failure> {
    pages(|page_token| {
        let mut service = client.pending();
        let request = v1::ListPendingRequest {
            vms: vms.clone(),
            page_size: PAGE_SIZE,
            page_token,
            ..Default::default()
        };
        async move {
            let page = service.list_pending(unary(request)).await?.into_inner();
            Ok((page.requests, page.next_page_token))
        }
    })
    .await
}

/// Puts requests of one registrable domain together, where the oldest of them stands.
fn together(requests: &mut [v1::PendingRequest]) {
    let mut first: HashMap<String, usize> = HashMap::new();
    for (at, request) in requests.iter().enumerate() {
        if !request.domain.is_empty() {
            first.entry(request.domain.clone()).or_insert(at);
        }
    }
    let mut at = 0;
    requests.sort_by_cached_key(|request| {
        let place = first.get(&request.domain).copied().unwrap_or(at);
        at += 1;
        place
    });
}

fn watch_line(context: &mut Context, change: &v1::WatchPendingResponse) -> Result<(), Failure> {
    use v1::PendingChange as Change;

    let is_table = context.output.format() == output::Format::Table;
    match (change.change(), &change.request) {
        (Change::Gap, _) if is_table => {
            output::say("some changes were missed; `vnetctl pending list` has what is open now");
            Ok(())
        }
        (Change::Synced, _) if is_table => Ok(()),
        (_, request) => context
            .output
            .stream("vnet.v1.WatchPendingResponse", change, WATCH, |_| {
                let request = request.clone().unwrap_or_default();
                let what = match change.change() {
                    Change::Removed => words::pending_state(request.state),
                    _ => words::pending_change(change.change),
                };
                vec![
                    what,
                    request.id.clone(),
                    request.vm.clone(),
                    asks(&request),
                    names(&request),
                ]
            }),
    }
}

impl Row for v1::PendingRequest {
    const NAME: &'static str = "vnet.v1.PendingRequest";
    const COLUMNS: &'static [&'static str] = &[
        "ID", "VM", "DOMAIN", "ASKS", "NAMES", "COUNT", "HELD", "AGE", "NOTE",
    ];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        vec![
            self.id.clone(),
            self.vm.clone(),
            text::or_none(self.domain.as_str()),
            asks(self),
            text::or_none(names(self)),
            self.count.to_string(),
            text::remaining(now, self.held_until.as_ref()),
            text::age(now, self.created_at.as_ref()),
            text::or_none(guarded(self)),
        ]
    }
}

/// What is asked for, as `tcp 10.99.0.1:8080`, `domain example.com` or, of another VM, `tcp 192.168.127.3:22 (db)`.
pub fn asks(request: &v1::PendingRequest) -> String {
    words::of_vm(words::target(request.target.as_ref()), &request.peer_vm)
}

/// Names bound to the address that is asked for, best first, as many as fit a line. A question about a
/// name says it already.
pub fn names(request: &v1::PendingRequest) -> String {
    let kind = request.target.as_ref().and_then(|target| target.kind.as_ref());
    if matches!(kind, Some(v1::target::Kind::Name(_))) {
        return String::new();
    }
    names_of(&request.names)
}

/// Some of the names, and how many more there are.
pub(crate) fn names_of(names: &[String]) -> String {
    let mut shown = names
        .iter()
        .take(NAMES_SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(",");
    if names.len() > NAMES_SHOWN {
        shown.push_str(&format!(" and {} more", names.len() - NAMES_SHOWN));
    }
    shown
}

/// The guards that a request is under. That of DNS is a policy's and no property of the address: the reason
/// names it. That an address is synthetic guards nothing: the name is what is asked for.
pub(crate) fn guards(request: &v1::PendingRequest) -> Vec<String> {
    let mut guards: Vec<String> = request.guards.iter().map(|g| words::guard(*g)).collect();
    if let Some(reason) = &request.reason
        && reason.step == "guard"
        && reason.subject != words::guard(v1::Guard::Synthetic.into())
        && !guards.contains(&reason.subject)
    {
        guards.push(reason.subject.clone());
    }
    guards
}

fn guarded(request: &v1::PendingRequest) -> String {
    let guards = guards(request);
    if guards.is_empty() {
        String::new()
    } else {
        format!("guarded: {}", guards.join(","))
    }
}

/// Everything a person may want to know before answering.
pub fn details(request: &v1::PendingRequest, now: SystemTime) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("Id", request.id.clone()),
        ("VM", request.vm.clone()),
        ("Labels", text::or_none(words::labels(&request.labels))),
        ("Asks", asks(request)),
        ("Names", text::or_none(request.names.join(","))),
        ("Query type", text::or_none(request.query_type.as_str())),
        ("State", words::pending_state(request.state)),
        (
            "Asked",
            format!(
                "{} ago, {} times",
                text::age(now, request.created_at.as_ref()),
                request.count
            ),
        ),
        (
            "Held",
            match &request.held_until {
                Some(until) => format!(
                    "{} packets, for {} more",
                    request.held,
                    text::remaining(now, Some(until))
                ),
                None => "nothing now; a yes serves the next attempt".to_owned(),
            },
        ),
        ("Expires in", text::remaining(now, request.expires_at.as_ref())),
        ("Guards", text::or_none(guarded(request))),
        ("Because", words::reason(request.reason.as_ref())),
    ];
    if request.options.is_empty() {
        let scopes: Vec<String> = request.scopes.iter().map(|s| words::scope(*s)).collect();
        lines.push(("Scopes", text::or_none(scopes.join(", "))));
    }
    for option in &request.options {
        let target = words::target(option.target.as_ref());
        lines.push(("Scope", format!("{}: {target}", words::scope(option.scope))));
        lines.extend(option.reaches.iter().map(|reach| ("", covers(reach))));
    }
    if !request.grant_id.is_empty() {
        lines.push(("Grant", request.grant_id.clone()));
    }
    lines
}

/// What a yes for some VMs would cover.
fn covers(reach: &v1::ScopeReach) -> String {
    let count = |n: u64, one: &str| format!("{n} {one}{}", if n == 1 { "" } else { "s" });
    format!(
        "  for {} ({}): {}, {}, {}",
        words::selector(reach.vms.as_ref()),
        count(reach.vm_count.into(), "VM"),
        count(reach.requests.into(), "request"),
        count(reach.names.into(), "known name"),
        count(reach.past_flows, "past flow"),
    )
}

const NAMES_SHOWN: usize = 3;
const WATCH: &[(&str, usize)] = &[("CHANGE", 9), ("ID", 12), ("VM", 20), ("ASKS", 28), ("NAMES", 0)];

//! `events watch|list`: what happened, live and in the history.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use super::select::{ListVmArgs, duration};
use crate::client::{LIST_ITEMS_MAX, PAGE_SIZE, unary};
use crate::failure::Failure;
use crate::output::{self, Format, Row, text, words};

/// Verbs of `events`.
#[derive(Debug, Subcommand)]
pub enum EventsCommand {
    /// Print events as they happen, until interrupted
    #[command(
        after_help = "Examples:\n  vnetctl events watch\n  vnetctl events watch --kind flow-denied -o json\n  \
        vnetctl events watch --after 0        # everything still kept, then live"
    )]
    Watch(WatchArgs),
    /// List past events, newest first
    #[command(
        after_help = "Examples:\n  vnetctl events list\n  vnetctl events list --since 1h --kind flow-denied\n  \
        vnetctl events list --vm web --limit 1000 -o json"
    )]
    List(ListArgs),
}

/// Arguments of `events watch`.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Which VMs.
    #[command(flatten)]
    pub vms: ListVmArgs,
    /// Only this network's, and those of no network, as of a policy
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
    /// Only this kind; may be repeated
    #[arg(long, value_name = "KIND", value_parser = kind)]
    pub kind: Vec<v1::EventKind>,
    /// Begin after the event of this sequence number rather than now
    #[arg(long, value_name = "SEQUENCE")]
    pub after: Option<u64>,
}

/// Arguments of `events list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Which VMs.
    #[command(flatten)]
    pub vms: ListVmArgs,
    /// Only this network's, and those of no network, as of a policy
    #[arg(long, value_name = "NETWORK")]
    pub network: Option<String>,
    /// Only this kind; may be repeated
    #[arg(long, value_name = "KIND", value_parser = kind)]
    pub kind: Vec<v1::EventKind>,
    /// Only those of the last TIME, as `10m` or `1h`
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub since: Option<Duration>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=LIST_ITEMS_MAX as i64))]
    pub limit: u32,
}

impl EventsCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        match self {
            Self::Watch(args) => watch(args, context).await,
            Self::List(args) => list(args, context).await,
        }
    }
}

async fn watch(args: WatchArgs, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let request = v1::WatchEventsRequest {
        vms: args.vms.message(),
        kinds: kinds(&args.kind),
        after_sequence: args.after,
        network: args.network.unwrap_or_default(),
    };
    let mut events = client.events().watch_events(request).await?.into_inner();
    context.output.stream_header(WATCH)?;
    while let Some(answer) = events.message().await? {
        let Some(event) = answer.event else { continue };
        if event.kind() == v1::EventKind::Gap && context.output.format() == Format::Table {
            output::say(format!(
                "{} events were missed; `vnetctl events list` has the history",
                event.missed
            ));
            continue;
        }
        context.output.stream(v1::Event::NAME, &event, WATCH, |_| {
            vec![
                text::time(event.time.as_ref()),
                words::event_kind(event.kind),
                text::or_none(event.vm.as_str()),
                what(&event),
            ]
        })?;
    }
    Err(Failure::Failed("the controlplane ended the watch".to_owned()))
}

async fn list(args: ListArgs, context: &mut Context) -> Result<(), Failure> {
    let client = context.connection.open().await?;
    let time = args.since.map(|since| v1::TimeRange {
        start: context
            .output
            .now()
            .checked_sub(since)
            .map(prost_types::Timestamp::from),
        end: None,
    });
    let limit = args.limit as usize;
    let mut events: Vec<v1::Event> = Vec::new();
    let mut page_token = String::new();
    // The history may be far longer than what was asked for: read no more pages than that needs.
    while events.len() < limit {
        let page_size = PAGE_SIZE.min(u32::try_from(limit - events.len()).unwrap_or(PAGE_SIZE));
        let request = v1::ListEventsRequest {
            vms: args.vms.message(),
            kinds: kinds(&args.kind),
            time,
            page_size,
            page_token,
            network: args.network.clone().unwrap_or_default(),
        };
        let page = client.events().list_events(unary(request)).await?.into_inner();
        events.extend(page.events);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    events.truncate(limit);
    context.output.list(&events)
}

impl Row for v1::Event {
    const NAME: &'static str = "vnet.v1.Event";
    const COLUMNS: &'static [&'static str] = &["SEQUENCE", "TIME", "KIND", "VM", "WHAT"];

    fn cells(&self, _: SystemTime) -> Vec<String> {
        vec![
            self.sequence.to_string(),
            text::time(self.time.as_ref()),
            words::event_kind(self.kind),
            text::or_none(self.vm.as_str()),
            what(self),
        ]
    }
}

/// The event's sentence; where it has none, its facts.
fn what(event: &v1::Event) -> String {
    let times = if event.count > 1 {
        format!(" ({} times)", event.count)
    } else {
        String::new()
    };
    if !event.text.is_empty() {
        return format!("{}{times}", event.text);
    }
    let mut facts = Vec::new();
    if event.tuple.is_some() {
        facts.push(words::of_vm(words::far_end(event.tuple.as_ref()), &event.peer_vm));
    }
    facts.extend(event.names.iter().take(1).cloned());
    if !event.subject.is_empty() {
        facts.push(event.subject.clone());
    }
    if event.reason.is_some() {
        facts.push(format!("({})", words::reason(event.reason.as_ref())));
    }
    format!("{}{times}", text::or_none(facts.join(" ")))
}

fn kinds(kinds: &[v1::EventKind]) -> Vec<i32> {
    kinds.iter().map(|kind| i32::from(*kind)).collect()
}

/// Parses a kind as the table shows it.
fn kind(text: &str) -> Result<v1::EventKind, String> {
    let name = format!("EVENT_KIND_{}", text.to_ascii_uppercase().replace('-', "_"));
    v1::EventKind::from_str_name(&name)
        .filter(|k| *k != v1::EventKind::Unspecified)
        .ok_or_else(|| {
            let known = (1..).map_while(|n| v1::EventKind::try_from(n).ok());
            let known: Vec<String> = known.map(|k| words::event_kind(k.into())).collect();
            format!(
                "{text:?} is not a kind of event (expected one of {})",
                known.join(", ")
            )
        })
}

const WATCH: &[(&str, usize)] = &[("TIME", 20), ("KIND", 16), ("VM", 20), ("WHAT", 0)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_typed_as_they_are_shown() {
        assert_eq!(kind("flow-denied"), Ok(v1::EventKind::FlowDenied));
        let error = kind("unspecified").unwrap_err();
        assert!(
            error.contains("one of vm-attached, ") && error.ends_with("history-cut-off, forward-denied)"),
            "{error}"
        );
    }

    #[test]
    fn an_event_without_a_sentence_shows_its_facts() {
        let event = v1::Event {
            tuple: Some(v1::FlowTuple {
                protocol: v1::Protocol::Tcp.into(),
                address: "192.0.2.7".to_owned(),
                port: 443,
                ..Default::default()
            }),
            names: vec!["example.com".to_owned()],
            count: 3,
            ..Default::default()
        };

        assert_eq!(what(&event), "tcp 192.0.2.7:443 example.com (3 times)");
        assert_eq!(what(&v1::Event::default()), "-");
    }
}

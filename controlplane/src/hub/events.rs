//! Events: numbered once, then to the watchers and the history.

use std::collections::BTreeMap;
use std::sync::Arc;

use vnet_proto::model::{Guard, Reason, Subject, Target, VmSelector};
use vnet_proto::v1;

use super::Hub;
use crate::approval::{Asked, PendingState, Request};
use crate::clock::Now;
use crate::convert;
use crate::fleet::Fleet;
use crate::grant::Grant;
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::store::History;
use crate::watch::{Watch, Watchers};

/// What a reader of events asked for.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// Which VMs; `None`: all, and events of no VM.
    pub vms: Option<VmSelector>,
    /// Which kinds; empty: all.
    pub kinds: Vec<i32>,
    /// Which network; empty: all. What concerns no network, as a policy, concerns every one.
    pub network: String,
}

impl EventFilter {
    /// Whether it lets an event through. Labels are those that the VM has now.
    fn lets(&self, event: &v1::Event, fleet: &Fleet) -> bool {
        (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && (self.network.is_empty() || is_of(&self.network, event, fleet))
            && self.vms.as_ref().is_none_or(|selector| {
                !event.vm.is_empty()
                    && match fleet.vms.get(&event.vm) {
                        Some(vm) => selector.matches(&event.vm, &vm.view.labels),
                        None => selector.matches(&event.vm, &Default::default()),
                    }
            })
    }
}

/// Whether an event is a network's. Where it was is said in the event, as its VM's name may be another's by now; only
/// who is reached by a grant for several VMs is seen by those that are there.
fn is_of(network: &str, event: &v1::Event, fleet: &Fleet) -> bool {
    if !event.network.is_empty() {
        return event.network == network;
    }
    // Before there was `grant_vms`, only what was made of a grant said whom it was for.
    let of_grant = event.grant.as_ref().and_then(|grant| grant.vms.as_ref());
    let selector = match event.grant_vms.as_ref().or(of_grant) {
        Some(selector) => VmSelector::try_from(selector.clone()).ok(),
        // For whom an old one was is not known: nobody's, rather than everybody's.
        None if event.vm.is_empty() => return !is_of_grant(event),
        None => VmSelector::new(Some(event.vm.clone()), BTreeMap::new()),
    };
    // Of one VM alone it would say where that was, had it been on any.
    let selector = selector.filter(|selector| selector.name().is_none_or(|name| name.contains('*')));
    selector.is_some_and(|selector| {
        let mut there = fleet.on_network(network);
        there.any(|vm| selector.matches(&vm.view.name, &vm.view.labels))
    })
}

/// How far the numbers go on after a history that was cut off: beyond any that was given to a watcher and never
/// recorded, so that no number means two events. What waits to be recorded is far fewer; what found no room for that,
/// since the disk stood still, has numbers too.
const CUT_OFF_STEP: u64 = 1_000_000_000;

/// The numbering, the watchers, and what is still to be recorded.
#[derive(Debug)]
pub(super) struct EventLog {
    sequence: u64,
    pub(super) watchers: Watchers<EventFilter, v1::Event>,
    pub(super) unrecorded: Vec<v1::Event>,
}

impl EventLog {
    pub(super) fn new(history: History, watchers: Watchers<EventFilter, v1::Event>) -> Self {
        let given_out = if history.cut_off { CUT_OFF_STEP } else { 0 };
        Self {
            sequence: history.last_sequence + given_out,
            watchers,
            unrecorded: Vec::new(),
        }
    }

    pub(super) fn publish(&mut self, now: Now, fleet: &Fleet, metrics: &Metrics, mut event: v1::Event) {
        self.sequence += 1;
        event.sequence = self.sequence;
        locate(&mut event, fleet);
        event.time = convert::timestamp(now.wall);
        metrics.events.add(1);
        if !self.watchers.is_empty() {
            let shared = Arc::new(event.clone());
            self.watchers
                .publish(|filter| filter.lets(&event, fleet).then(|| Arc::clone(&shared)));
        }
        self.unrecorded.push(event);
    }
}

impl Hub {
    /// Events from now on, and the number of the last one before.
    ///
    /// # Errors
    /// [`Refusal::Limit`] if too many watch.
    pub fn watch_events(&self, filter: EventFilter) -> Result<(Watch<v1::Event>, u64), Refusal> {
        self.read(|state, _| {
            let sequence = state.events.sequence;
            let watch = state.events.watchers.add(filter, [])?;
            Ok((watch, sequence))
        })
    }

    /// Leaves to the history what was only counted so far: somebody is about to read it.
    pub fn bring_history_up_to_date(&self) {
        self.read(super::State::tell_repeats);
    }

    /// The events of a list that a filter lets through; gaps always are.
    pub fn filter_events(&self, filter: &EventFilter, events: Vec<v1::Event>) -> Vec<v1::Event> {
        let gap = i32::from(v1::EventKind::Gap);
        let lets = |state: &super::State, e: &v1::Event| e.kind == gap || filter.lets(e, &state.fleet);
        self.read(|state, _| events.into_iter().filter(|e| lets(state, e)).collect())
    }
}

/// Whether an event is of what happens to a grant.
fn is_of_grant(event: &v1::Event) -> bool {
    matches!(
        event.kind(),
        v1::EventKind::GrantCreated | v1::EventKind::GrantUsedUp | v1::EventKind::GrantEnded
    )
}

/// Says where the VM of an event is, unless the event says it already. Of what happens to a grant only who made the
/// event knows whether it is for the VM of that name that is there.
pub(super) fn locate(event: &mut v1::Event, fleet: &Fleet) {
    if event.network.is_empty() && !is_of_grant(event) {
        fleet
            .network_of(&event.vm)
            .unwrap_or_default()
            .clone_into(&mut event.network);
    }
}

/// The event that says where a history was cut off.
pub(super) fn cut_off() -> v1::Event {
    let text = "the controlplane before this one ended without closing its history (it was killed, or the \
                machine stopped): what happened in its last moments may be missing";
    about(v1::EventKind::HistoryCutOff, "", text)
}

/// An event about a VM.
pub(super) fn about(kind: v1::EventKind, vm: &str, text: impl Into<String>) -> v1::Event {
    v1::Event {
        kind: kind.into(),
        vm: vm.to_owned(),
        text: text.into(),
        ..Default::default()
    }
}

/// An event about a grant: of a VM, where it is for one alone. Whom it is for is said in any case, and not by `grant`,
/// which is of one that was made.
pub(super) fn about_grant(
    kind: v1::EventKind,
    grant: &Grant,
    fleet: &Fleet,
    text: impl Into<String>,
) -> v1::Event {
    let name = grant.vms.name().unwrap_or_default();
    let reached = fleet.vms.get(name).filter(|vm| grant.reaches(&vm.view));
    v1::Event {
        subject: grant.id.0.clone(),
        grant_vms: Some((&grant.vms).into()),
        network: reached
            .and_then(|_| fleet.network_of(name))
            .unwrap_or_default()
            .to_owned(),
        ..about(kind, name, text)
    }
}

/// Adds what a flow or lookup is to an event, and the other guest that it is for.
pub(super) fn on_subject(mut event: v1::Event, subject: &Subject, peer: &str) -> v1::Event {
    event.peer_vm = peer.to_owned();
    match subject {
        Subject::Flow(flow) => {
            event.tuple = Some(convert::tuple(&flow.key));
            event.guards = flow.guards.iter().map(|g| v1::Guard::from(g).into()).collect();
            if flow.dialled != flow.key.peer.ip() {
                event.dialled = flow.dialled.to_string();
            }
            event.names = flow.names.iter().map(ToString::to_string).collect();
        }
        Subject::Lookup(lookup) => {
            event.names = vec![lookup.name.to_string()];
            event.query_type = convert::record_type(lookup.query_type);
        }
    }
    event
}

/// What became of a flow or lookup and why, by its own target: the reason may be one that was made for another.
pub(super) fn outcome_of(subject: &Subject, peer: &str, reason: &Reason) -> String {
    let target = match subject {
        Subject::Flow(flow) if flow.guards.contains(Guard::Synthetic) => {
            format!("{} to {}", flow.key.protocol, Target::of_subject(flow))
        }
        Subject::Flow(flow) => flow.key.to_string(),
        Subject::Lookup(lookup) => {
            format!(
                "lookup of {} ({})",
                lookup.name,
                convert::record_type(lookup.query_type)
            )
        }
    };
    format!("{target}{}: {}", of_peer(peer), reason.text)
}

/// Whose an address is, for a sentence: nothing where it is no guest's.
pub(super) fn of_peer(peer: &str) -> String {
    if peer.is_empty() {
        String::new()
    } else {
        format!(" of VM {peer}")
    }
}

/// What a request asks for, as `for tcp 192.0.2.7:443 of VM db` or `to open tcp 127.0.0.1:8080 to its port 80`.
fn what(request: &Request) -> String {
    match &request.asked {
        Asked::Miss(_) => format!("for {}{}", request.target(), of_peer(&request.peer)),
        Asked::Forward(forward) => forward.in_words(),
    }
}

/// Adds what a request asks for to an event about it.
fn on_request(event: v1::Event, request: &Request) -> v1::Event {
    match &request.asked {
        Asked::Miss(subject) => on_subject(event, subject, &request.peer),
        Asked::Forward(_) => event,
    }
}

pub(super) fn pending_opened(request: &Request) -> v1::Event {
    let text = format!("{} asks {}", request.vm.name, what(request));
    let event = about(v1::EventKind::PendingOpened, &request.vm.name, text);
    v1::Event {
        subject: request.id.0.clone(),
        reason: Some((&request.reason).into()),
        action: v1::Action::Ask.into(),
        ..on_request(event, request)
    }
}

pub(super) fn pending_closed(request: &Request) -> v1::Event {
    let text = format!("{} {} is {}", request.vm.name, what(request), request.state);
    let event = about(v1::EventKind::PendingClosed, &request.vm.name, text);
    let action = match request.state {
        PendingState::Approved => v1::Action::Allow,
        PendingState::Denied => v1::Action::Deny,
        _ => v1::Action::Unspecified,
    };
    v1::Event {
        subject: request.id.0.clone(),
        action: action.into(),
        count: request.count,
        ..on_request(event, request)
    }
}

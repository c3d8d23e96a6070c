//! The conversation: what each message does, in both directions, without I/O. Time is an argument.
//!
//! The rules are those above `Session` in `vnet/v1/dataplane.proto`. Messages to the controlplane leave
//! through one queue in the order in which things happened, so that an acknowledgement never overtakes
//! the flows that were reported before it.
//!
//! This file has its course: who speaks when, heartbeats and silence, reports and the queue. [`hello`] is
//! how it begins, [`answers`] what the controlplane decides, [`orders`] what it has done and is told of.

mod answers;
mod hello;
mod orders;

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use vnet_proto::model::{CommandId, Epoch, Malformed, VmId};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Response;

use crate::capture::{Capture, CaptureEnd};
use crate::causes::WithCauses;
use crate::guards::Guards;
use crate::message::{Input, Order, Report, Router};
use crate::metrics::{Metrics, MirrorTable, RefusedMessage};
use crate::session::capture::{Asked, Token};
use crate::session::commands::Commands;
use crate::session::mirror::{Full, Limits, Mirror};
use crate::session::{Identity, wire};

use orders::{COMMANDS_MAX, Pending};

/// Why the conversation cannot go on. The stream is closed, and a new one begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("the controlplane's first message is not a Welcome")]
    NotWelcome,
    #[error("the controlplane's Welcome cannot be used")]
    Welcome(#[source] Malformed),
    #[error("no Welcome came within {WELCOME_PATIENCE:?}")]
    NoWelcome,
    #[error("nothing was heard for three heartbeat intervals of {0:?}")]
    Silent(Duration),
    #[error("{NONSENSE_MAX} messages of the controlplane could not be understood; the last: {0}")]
    Nonsense(String),
    #[error("{COMMANDS_MAX} commands wait for guests to carry them out")]
    Commands,
    #[error("the controlplane does not read what it is sent")]
    Outbox,
}

enum Link {
    /// No stream, or none that was greeted.
    Offline,
    /// Hello is sent. What is queued meanwhile leaves after Welcome.
    Greeting { until: Instant },
    /// Welcome is in force.
    Open {
        heartbeat: Duration,
        next_heartbeat: Instant,
        silent_at: Instant,
        nonsense: u32,
        lease: Duration,
    },
}

pub(super) struct Conversation {
    identity: Identity,
    router: Arc<dyn Router>,
    commands: Commands,
    guards: Arc<Guards>,
    metrics: Arc<Metrics>,
    mirror: Mirror,
    link: Link,
    /// The epoch in force, as last heard; kept over a reconnect.
    epoch: Option<Epoch>,
    hold: Duration,
    /// The controlplane judges aliases, as the last Welcome said.
    judges_aliases: bool,
    /// Where it last said that other dataplanes listen.
    closed: Vec<SocketAddr>,
    /// What one before a restart said, and until when it holds beside that.
    closed_before: Option<(Instant, Vec<SocketAddr>)>,
    outbox: VecDeque<Message>,
    /// How long the outbox was after the last Hello; what is replayed has no limit but the mirror's.
    replay: usize,
    /// Refusals that happened without a session, for the history.
    refusals: VecDeque<Message>,
    pending: HashMap<CommandId, Pending>,
    last_command: u64,
    /// Captures that this session asked for.
    captures: HashMap<Token, Weak<Capture>>,
    /// Those of them that have yet to be sent.
    to_send: Vec<Asked>,
}

impl Conversation {
    pub(super) fn new(
        identity: Identity,
        router: Arc<dyn Router>,
        commands: Commands,
        guards: Arc<Guards>,
        metrics: Arc<Metrics>,
        limits: Limits,
    ) -> Self {
        Self {
            identity,
            router,
            commands,
            guards,
            metrics,
            mirror: Mirror::with_limits(limits),
            link: Link::Offline,
            epoch: None,
            hold: Duration::ZERO,
            judges_aliases: false,
            closed: Vec::new(),
            closed_before: None,
            outbox: VecDeque::new(),
            replay: 0,
            refusals: VecDeque::new(),
            pending: HashMap::new(),
            last_command: 0,
            captures: HashMap::new(),
            to_send: Vec::new(),
        }
    }

    /// Whether a Welcome is in force.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.link, Link::Open { .. })
    }

    /// Whether a Welcome ever was.
    pub(super) fn was_welcomed(&self) -> bool {
        self.epoch.is_some()
    }

    /// Whether every guest is gone.
    pub(super) fn has_no_guests(&self) -> bool {
        self.mirror.is_empty()
    }

    /// Whether reports may be taken from the drivers now. When not, they wait with the drivers.
    pub(super) fn accepts_reports(&self) -> bool {
        self.outbox.len() < OUTBOX_HIGH
    }

    /// The stream is gone.
    pub(super) fn lost(&mut self) {
        self.link = Link::Offline;
        self.pending.clear();
        for capture in self.captures.drain().filter_map(|(_, capture)| capture.upgrade()) {
            capture.stop(CaptureEnd::Stopped);
        }
        self.to_send.clear();
        self.metrics.session_up.set(0);
        for message in std::mem::take(&mut self.outbox) {
            self.keep_refusal(message);
        }
    }

    /// The next message to send, if one may be sent.
    pub(super) fn poll_transmit(&mut self) -> Option<v1::SessionRequest> {
        if !self.is_open() {
            return None;
        }
        let message = self.outbox.pop_front()?;
        if matches!(message, Message::Miss(_)) {
            self.metrics.misses_sent.increment();
        }
        Some(request(message))
    }

    /// Whether [`Self::poll_transmit`] has something.
    pub(super) fn has_transmit(&self) -> bool {
        self.is_open() && !self.outbox.is_empty()
    }

    /// Captures that are to be sent from now on.
    pub(super) fn take_captures(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.to_send)
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        match &self.link {
            Link::Offline => None,
            Link::Greeting { until } => Some(*until),
            Link::Open {
                next_heartbeat,
                silent_at,
                ..
            } => Some(*next_heartbeat.min(silent_at)),
        }
    }

    /// Sends heartbeats and notices silence. Spurious calls are harmless.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Result<(), Broken> {
        match &mut self.link {
            Link::Offline => return Ok(()),
            Link::Greeting { until } if *until <= now => return Err(Broken::NoWelcome),
            Link::Greeting { .. } => return Ok(()),
            Link::Open {
                heartbeat, silent_at, ..
            } if *silent_at <= now => {
                return Err(Broken::Silent(*heartbeat));
            }
            Link::Open { next_heartbeat, .. } if *next_heartbeat > now => return Ok(()),
            Link::Open {
                heartbeat,
                next_heartbeat,
                ..
            } => *next_heartbeat = now + *heartbeat,
        }
        self.outbox
            .push_back(Message::Heartbeat(v1::Heartbeat { epoch: None }));
        if self.closed_before.take_if(|(until, _)| *until <= now).is_some() {
            self.close_known();
        }
        // A driver that ended without a word must not hold an acknowledgement for ever.
        if !self.pending.is_empty() {
            let there: HashSet<VmId> = self.router.vms().into_iter().collect();
            self.settle(|waiting| waiting.retain(|vm| there.contains(vm)));
        }
        self.check_outbox()
    }

    /// Takes a driver's report.
    pub(super) fn handle_report(&mut self, report: Report, now: Instant) {
        let message = wire::report(&report, self.epoch);
        match report {
            Report::VmUp(up) => {
                let vm = up.vm;
                self.mirror.vm_up(up);
                self.brief(vm);
            }
            Report::VmStatus(status) => self.mirror.vm_status(status),
            Report::VmDown { vm, .. } => {
                self.mirror.vm_down(vm);
                self.send(message);
                self.settle(|waiting| {
                    waiting.remove(&vm);
                });
                return;
            }
            Report::Miss(miss) => {
                let mirrored = self.mirror.miss(miss, now);
                self.note_full(mirrored);
            }
            Report::MissEnded { miss, .. } => self.mirror.miss_ended(miss),
            Report::FlowOpened(flow) => {
                let id = flow.flow;
                let mirrored = self.mirror.flow_opened(flow);
                if self.note_full(mirrored) {
                    self.cut_unmirrored(id);
                }
            }
            Report::FlowClosed { flow, .. } => self.mirror.flow_closed(flow),
            Report::FlowStats(counts) => {
                for (flow, up, down) in counts {
                    self.mirror.flow_counted(flow, up, down);
                }
            }
            Report::Uses { vm, uses } => {
                for (grant, used) in uses {
                    let mirrored = self.mirror.used(vm, &grant, used);
                    self.note_full(mirrored);
                }
            }
            Report::Binding {
                vm,
                name,
                addresses,
                expires_in,
            } => {
                let mirrored = self.mirror.binding(vm, name, addresses, expires_in, now);
                self.note_full(mirrored);
            }
            Report::Done { vm, command, cut } => self.done(vm, command, cut),
            Report::Verdicts {
                command,
                verdicts,
                in_all,
                ..
            } => self.verdicts_reported(command, &verdicts, in_all),
            // The snapshot of the guards is what the next Hello says.
            Report::Decided { .. } | Report::LimitReached { .. } | Report::HostAddresses(_) | Report::End => {
            }
        }
        self.send(message);
    }

    /// Brings the gauges up to date; once a wake-up.
    pub(super) fn publish(&self) {
        self.metrics.held_misses.set(self.mirror.misses_len() as u64);
        self.metrics.live_flows.set(self.mirror.flows_len() as u64);
    }

    /// Takes a message of the controlplane.
    pub(super) fn handle_response(
        &mut self,
        message: v1::SessionResponse,
        now: Instant,
    ) -> Result<(), Broken> {
        self.metrics.messages_received.increment();
        match (&mut self.link, message.message) {
            (Link::Greeting { .. } | Link::Offline, Some(Response::Welcome(welcome))) => {
                let welcome = welcome.try_into().map_err(Broken::Welcome)?;
                self.welcome(welcome, now);
            }
            (Link::Greeting { .. } | Link::Offline, _) => return Err(Broken::NotWelcome),
            (
                Link::Open {
                    heartbeat, silent_at, ..
                },
                message,
            ) => {
                *silent_at = now + *heartbeat * SILENT_INTERVALS;
                if let Err(what) = self.obey(message, now)? {
                    self.nonsense(&what)?;
                }
            }
        }
        self.check_outbox()
    }

    fn welcome(&mut self, welcome: wire::Welcome, now: Instant) {
        let wire::Welcome {
            epoch,
            lease,
            heartbeat,
            hold,
            vms,
            closed,
            judges_aliases,
        } = welcome;
        let restarted = self
            .epoch
            .is_some_and(|known| known.incarnation != epoch.incarnation);
        tracing::info!(%epoch, restarted, "the controlplane welcomed this dataplane");
        self.epoch = Some(epoch);
        self.hold = hold;
        self.judges_aliases = judges_aliases;
        self.mirror.uses_told();
        self.link = Link::Open {
            heartbeat,
            next_heartbeat: now + heartbeat,
            silent_at: now + heartbeat * SILENT_INTERVALS,
            nonsense: 0,
            lease,
        };
        if restarted {
            // The others come back as this dataplane did, one after the other: until then it has not heard of them.
            let before = self.closed_before.take().map(|(_, closed)| closed);
            let mut before = before.unwrap_or_default();
            before.append(&mut self.closed);
            before.sort_unstable();
            before.dedup();
            self.closed_before = Some((now + RETURN_GRACE, before));
        }
        self.close(closed);
        // Before anything can be answered: what was decided before this epoch is void.
        self.router.broadcast(&Order::Revoke { command: None, epoch });
        self.router.broadcast(&Order::Lease { epoch, lease });
        for settings in vms {
            if let Err(error) = self.settings(settings) {
                tracing::warn!(%error, "settings in a Welcome are malformed");
                self.metrics
                    .messages_refused
                    .of(RefusedMessage::Malformed)
                    .increment();
            }
        }
        if !judges_aliases {
            // One that does not know what an alias is would take it for a lookup, and ask somebody.
            self.outbox.retain(|message| !is_about_alias(message));
        }
        for message in &mut self.outbox {
            if let Message::Miss(miss) = message {
                miss.epoch = Some(epoch.into());
            }
        }
        self.metrics.session_up.set(1);
        self.metrics.session_welcomes.increment();
    }

    /// Does what a message says. The inner error is what was malformed about it.
    fn obey(&mut self, message: Option<Response>, now: Instant) -> Result<Result<(), String>, Broken> {
        match message {
            Some(Response::Verdict(verdict)) => Ok(self.verdict(verdict, now)),
            Some(Response::Held(held)) => Ok(self.held(&held, now)),
            Some(Response::Heartbeat(heartbeat)) => Ok(self.heartbeat(heartbeat)),
            Some(Response::VmSettings(settings)) => {
                Ok(self.settings(settings).map_err(|e| WithCauses(&e).to_string()))
            }
            Some(Response::BudgetLimit(limit)) => Ok(self.budget_limit(limit)),
            Some(Response::ClosedAddresses(closed)) => {
                // What cannot be read would stay open: the next Welcome says it anew.
                let closed = wire::sockets("closed_addresses.addresses", &closed.addresses);
                self.close(closed.map_err(|e| Broken::Nonsense(e.to_string()))?);
                Ok(Ok(()))
            }
            Some(Response::Revoke(revoke)) => self.revoke(revoke),
            Some(Response::Cut(cut)) => self.cut(&cut),
            Some(Response::Command(command)) => {
                self.command(command);
                Ok(Ok(()))
            }
            Some(Response::Welcome(_)) => Ok(Err("a second Welcome".to_owned())),
            None => Ok(Err("a message of no kind that this version knows".to_owned())),
        }
    }

    /// These addresses are closed to guests now, beside the dataplane's own.
    fn close(&mut self, addresses: Vec<SocketAddr>) {
        self.closed = addresses;
        self.close_known();
    }

    /// What is known to be closed is.
    fn close_known(&self) {
        let before = self.closed_before.iter().flat_map(|(_, closed)| closed);
        if self
            .guards
            .set_closed(before.chain(&self.closed).copied().collect())
        {
            self.metrics.guard_changes.increment();
            self.router.broadcast(&Order::GuardsChanged);
        }
    }

    /// A guest that attaches while a Welcome is in force learns the epoch; its settings follow.
    fn brief(&self, vm: VmId) {
        if let (Link::Open { lease, .. }, Some(epoch)) = (&self.link, self.epoch) {
            self.router
                .send(vm, Input::Order(Order::Revoke { command: None, epoch }));
            self.router
                .send(vm, Input::Order(Order::Lease { epoch, lease: *lease }));
        }
    }

    /// Queues a report's message, or keeps it for later where nobody would know of it otherwise.
    fn send(&mut self, message: Option<Message>) {
        let Some(message) = message else { return };
        match self.link {
            Link::Open { .. } if !self.judges_aliases && is_about_alias(&message) => {}
            Link::Greeting { .. } | Link::Open { .. } => self.outbox.push_back(message),
            Link::Offline => self.keep_refusal(message),
        }
    }

    fn keep_refusal(&mut self, message: Message) {
        if matches!(message, Message::Decided(_)) {
            if self.refusals.len() >= REFUSALS_MAX {
                self.metrics.mirror_full.of(MirrorTable::Refusals).increment();
                self.refusals.pop_front();
            }
            self.refusals.push_back(message);
        }
    }

    fn note_full(&self, mirrored: Result<(), Full>) -> bool {
        match mirrored {
            Ok(()) => false,
            Err(Full(table)) => {
                self.metrics.mirror_full.of(table).increment();
                true
            }
        }
    }

    fn nonsense(&mut self, what: &str) -> Result<(), Broken> {
        self.metrics
            .messages_refused
            .of(RefusedMessage::Malformed)
            .increment();
        if let Link::Open { nonsense, .. } = &mut self.link {
            *nonsense += 1;
            tracing::warn!(what, "a message of the controlplane was not understood");
            if *nonsense >= NONSENSE_MAX {
                return Err(Broken::Nonsense(what.to_owned()));
            }
        }
        Ok(())
    }

    fn check_outbox(&self) -> Result<(), Broken> {
        // Reports stop at OUTBOX_HIGH; only answers to a controlplane that does not read get past it.
        if self.outbox.len() > OUTBOX_HIGH + OUTBOX_SPARE + self.replay {
            Err(Broken::Outbox)
        } else {
            Ok(())
        }
    }
}

fn is_about_alias(message: &Message) -> bool {
    let Message::Miss(miss) = message else {
        return false;
    };
    matches!(&miss.subject, Some(v1::miss::Subject::Lookup(lookup)) if lookup.alias)
}

fn request(message: Message) -> v1::SessionRequest {
    v1::SessionRequest {
        message: Some(message),
    }
}

/// How long a Welcome may take.
const WELCOME_PATIENCE: Duration = Duration::from_secs(5);
/// How long what a controlplane said is closed stays so after it restarted: as long as it keeps a dataplane that is
/// lost.
const RETURN_GRACE: Duration = Duration::from_secs(60);
/// So many heartbeat intervals without a word end a session.
const SILENT_INTERVALS: u32 = 3;
/// So many malformed messages end a session.
const NONSENSE_MAX: u32 = 16;
/// Messages queued for the stream at which no more reports are taken.
const OUTBOX_HIGH: usize = 4096;
/// Acknowledgements and repeated misses that may be queued beyond that.
const OUTBOX_SPARE: usize = 4096;
/// Refusals kept without a session.
const REFUSALS_MAX: usize = 1024;

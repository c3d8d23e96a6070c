//! The conversation: what each message does, in both directions, without I/O. Time is an argument.
//!
//! The rules are those above `Session` in `vnet/v1/dataplane.proto`. Messages to the controlplane leave
//! through one queue in the order in which things happened, so that an acknowledgement never overtakes
//! the flows that were reported before it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use vnet_proto::model::{CommandId, Epoch, FlowId, Malformed, Match, MissId, Subject, Verdict, VmId};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;
use vnet_proto::v1::session_response::Message as Response;

use crate::guards::Guards;
use crate::message::{Forward, Input, Order, Report, Router, Settings, vm_of_flow, vm_of_miss};
use crate::metrics::{Metrics, MirrorTable, RefusedMessage};
use crate::session::commands::{Commands, Refusal};
use crate::session::mirror::{Full, Limits, Mirror};
use crate::session::{Identity, wire};

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

/// A command that guests still work on.
struct Pending {
    /// Its id on the wire. Orders carry ids of our own, because those of the wire begin anew with each
    /// session, and a late answer to an old one must not count for a new one.
    id: u64,
    waiting: HashSet<VmId>,
    cut: u64,
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
    outbox: VecDeque<Message>,
    /// How long the outbox was after the last Hello; what is replayed has no limit but the mirror's.
    replay: usize,
    /// Refusals that happened without a session, for the history.
    refusals: VecDeque<Message>,
    pending: HashMap<CommandId, Pending>,
    last_command: u64,
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
            outbox: VecDeque::new(),
            replay: 0,
            refusals: VecDeque::new(),
            pending: HashMap::new(),
            last_command: 0,
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

    /// Begins a stream. The answer is its first message; nothing else may be sent before a Welcome.
    pub(super) fn hello(&mut self, now: Instant) -> v1::SessionRequest {
        self.outbox.clear();
        self.pending.clear();
        self.link = Link::Greeting {
            until: now + WELCOME_PATIENCE,
        };
        let mut hello = v1::Hello {
            protocol_version: PROTOCOL_VERSION,
            dataplane: self.identity.dataplane.clone(),
            boot_id: self.identity.boot_id.to_vec(),
            network: self.identity.network.clone(),
            subnet: self.identity.subnet.to_string(),
            subnet_ipv6: self
                .identity
                .subnet_ipv6
                .map(|net| net.to_string())
                .unwrap_or_default(),
            gateway: self.identity.gateway.to_string(),
            host_alias: self
                .identity
                .host_alias
                .map(|a| a.to_string())
                .unwrap_or_default(),
            host_addresses: Some(wire::host_addresses(&self.guards.host_addresses())),
            vms: self.mirror.vms().collect(),
            live_flows: Vec::new(),
            forwards: self.forwards(),
            zones: self.zones(),
            bindings: Vec::new(),
            capabilities: Vec::new(),
            software: concat!("vnet-dataplane ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        // A gRPC message has a limit of size; what does not fit follows as if it happened just now.
        let mut room = HELLO_BYTES_MAX.saturating_sub(hello.encoded_len());
        for flow in self.mirror.flows() {
            if fits(&mut room, flow.encoded_len()) {
                hello.live_flows.push(flow);
            } else {
                self.outbox.push_back(Message::FlowOpened(flow));
            }
        }
        for binding in self.mirror.bindings(now) {
            if fits(&mut room, binding.encoded_len()) {
                hello.bindings.push(binding);
            } else {
                self.outbox.push_back(Message::Binding(binding));
            }
        }
        self.outbox.extend(self.mirror.statuses().map(Message::VmStatus));
        let before = self.outbox.len();
        self.outbox.extend(
            self.mirror
                .misses(now)
                .map(|held| Message::Miss(held.to_message(now, None))),
        );
        self.metrics
            .misses_reannounced
            .add((self.outbox.len() - before) as u64);
        self.outbox.append(&mut self.refusals);
        self.replay = self.outbox.len();
        request(Message::Hello(hello))
    }

    /// The stream is gone.
    pub(super) fn lost(&mut self) {
        self.link = Link::Offline;
        self.pending.clear();
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
            Report::VmDown(vm) => {
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
            // The snapshot of the guards is what the next Hello says.
            Report::Decided { .. } | Report::HostAddresses(_) | Report::End => {}
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
        } = welcome;
        let restarted = self
            .epoch
            .is_some_and(|known| known.incarnation != epoch.incarnation);
        tracing::info!(%epoch, restarted, "the controlplane welcomed this dataplane");
        self.epoch = Some(epoch);
        self.hold = hold;
        self.link = Link::Open {
            heartbeat,
            next_heartbeat: now + heartbeat,
            silent_at: now + heartbeat * SILENT_INTERVALS,
            nonsense: 0,
            lease,
        };
        if self.guards.set_closed(closed) {
            self.metrics.guard_changes.increment();
            self.router.broadcast(&Order::GuardsChanged);
        }
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
            Some(Response::VmSettings(settings)) => Ok(self.settings(settings).map_err(|e| chain(&e))),
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

    fn verdict(&mut self, message: v1::Verdict, now: Instant) -> Result<(), String> {
        // Malformed, it decides nothing: the miss ends at its deadline.
        let verdict = Verdict::try_from(message).map_err(|error| chain(&error))?;
        let miss = verdict.miss;
        if let Some(held) = self.mirror.held_miss(miss)
            && !covers(&verdict.found, &held.miss.subject)
        {
            return Err(format!(
                "a verdict for {} does not cover miss {miss}",
                verdict.found
            ));
        }
        if !self.epoch.is_some_and(|epoch| verdict.epoch.stands_under(epoch)) {
            self.metrics
                .messages_refused
                .of(RefusedMessage::StaleVerdict)
                .increment();
            self.ask_again(miss, now);
            return Ok(());
        }
        self.mirror.miss_ended(miss);
        if self
            .router
            .send(vm_of_miss(miss), Input::Order(Order::Verdict(Box::new(verdict))))
        {
            self.metrics.verdicts.increment();
        } else {
            self.metrics
                .messages_refused
                .of(RefusedMessage::NoSuchVm)
                .increment();
        }
        Ok(())
    }

    fn ask_again(&mut self, miss: MissId, now: Instant) {
        if let Some(held) = self.mirror.held_miss(miss) {
            let message = held.to_message(now, self.epoch);
            self.metrics.misses_reannounced.increment();
            self.outbox.push_back(Message::Miss(message));
        }
    }

    fn held(&mut self, message: &v1::Held, now: Instant) -> Result<(), String> {
        let miss = MissId(message.miss_id);
        let hold =
            wire::positive("held.hold", message.hold, wire::HOLD_MAX).map_err(|error| error.to_string())?;
        self.mirror.held(miss, hold, now);
        if !self
            .router
            .send(vm_of_miss(miss), Input::Order(Order::Held { miss, hold }))
        {
            self.metrics
                .messages_refused
                .of(RefusedMessage::NoSuchVm)
                .increment();
        }
        Ok(())
    }

    fn heartbeat(&mut self, message: v1::Heartbeat) -> Result<(), String> {
        let heard = wire::required("heartbeat.epoch", message.epoch)
            .and_then(Epoch::try_from)
            .map_err(|error| error.to_string())?;
        let Link::Open { lease, .. } = self.link else {
            return Ok(());
        };
        if self.epoch == Some(heard) {
            self.router.broadcast(&Order::Lease { epoch: heard, lease });
        } else {
            // Of an epoch whose Revoke is still to come, or of an old one: neither may prolong anything.
            self.metrics
                .messages_refused
                .of(RefusedMessage::StaleHeartbeat)
                .increment();
        }
        Ok(())
    }

    fn settings(&mut self, message: v1::VmSettings) -> Result<(), Malformed> {
        let vm = VmId(message.vm);
        let lookup_hold = match message.lookup_hold {
            None => self.mirror.resolver_patience(vm).unwrap_or(RESOLVER_PATIENCE),
            given => wire::positive("vm_settings.lookup_hold", given, wire::HOLD_MAX)?,
        };
        let settings = Settings {
            name: message.name,
            switch_open: message.switch_open,
            forwards_closed: message.forwards_closed,
            lookup_hold,
            hold: self.hold,
        };
        if !self.router.send(vm, Input::Order(Order::Settings(settings))) {
            self.metrics
                .messages_refused
                .of(RefusedMessage::NoSuchVm)
                .increment();
        }
        Ok(())
    }

    fn revoke(&mut self, message: v1::Revoke) -> Result<Result<(), String>, Broken> {
        let id = message.command_id;
        let epoch = wire::required("revoke.epoch", message.epoch).and_then(Epoch::try_from);
        let epoch = match (epoch, self.epoch) {
            (Ok(epoch), Some(known)) if epoch.incarnation == known.incarnation => {
                // An older one asks for less than what is done already.
                Epoch {
                    counter: epoch.counter.max(known.counter),
                    ..epoch
                }
            }
            (Ok(_), _) => {
                return Ok(Err(
                    self.refuse_malformed(id, "revoke.epoch is of another incarnation")
                ));
            }
            (Err(error), _) => return Ok(Err(self.refuse_malformed(id, &error.to_string()))),
        };
        self.epoch = Some(epoch);
        let command = self.next_command()?;
        let told = self.router.broadcast(&Order::Revoke {
            command: Some(command),
            epoch,
        });
        self.wait_for(command, id, told);
        Ok(Ok(()))
    }

    fn cut(&mut self, message: &v1::Cut) -> Result<Result<(), String>, Broken> {
        let command = self.next_command()?;
        let mut by_vm: BTreeMap<VmId, Vec<FlowId>> = BTreeMap::new();
        for flow in message.flow_ids.iter().copied().map(FlowId) {
            by_vm.entry(vm_of_flow(flow)).or_default().push(flow);
        }
        if !message.flow_ids.is_empty() {
            tracing::info!(
                flows = message.flow_ids.len(),
                why = message.text,
                "flows are to be cut"
            );
        }
        let told = by_vm
            .into_iter()
            .filter(|(vm, flows)| {
                self.router.send(
                    *vm,
                    Input::Order(Order::Cut {
                        command,
                        flows: flows.clone(),
                    }),
                )
            })
            .map(|(vm, _)| vm)
            .collect();
        self.wait_for(command, message.command_id, told);
        Ok(Ok(()))
    }

    fn command(&mut self, message: v1::Command) {
        use v1::command::Command;
        let answer = match message.command {
            Some(Command::Expose(forward)) => self.expose(&forward).map(Some),
            Some(Command::Unexpose(forward)) => wire::forward_from_wire(&forward)
                .and_then(|(protocol, listen, _)| {
                    self.commands
                        .forwards
                        .unexpose(protocol, listen)
                        .map_err(Into::into)
                })
                .map(Some),
            Some(Command::SetZone(zone)) => wire::zone_from_wire(&zone)
                .and_then(|zone| self.commands.zones.set_zone(zone))
                .map(|()| None),
            Some(Command::DeleteZone(zone)) => wire::zone_name(&zone.name)
                .and_then(|name| self.commands.zones.delete_zone(name.as_ref()))
                .map(|()| None),
            None => Err(Refusal {
                code: tonic::Code::Unimplemented,
                text: "the command is none that this version knows".to_owned(),
            }),
        };
        let (forward, error) = match answer {
            Ok(forward) => (
                forward.map(|f| wire::forward_to_wire(&f, &self.identity.network)),
                None,
            ),
            Err(refusal) => (None, Some(refusal)),
        };
        self.acknowledge(message.command_id, 0, forward, error);
    }

    fn expose(&self, message: &v1::Forward) -> Result<Forward, Refusal> {
        let (protocol, listen, target) = wire::forward_from_wire(message)?;
        let target = target.ok_or_else(|| Refusal::invalid("forward.target is not set"))?;
        self.commands.expose(Forward {
            protocol,
            listen,
            target,
        })
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

    fn next_command(&mut self) -> Result<CommandId, Broken> {
        if self.pending.len() >= COMMANDS_MAX {
            return Err(Broken::Commands);
        }
        self.last_command += 1;
        Ok(CommandId(self.last_command))
    }

    fn wait_for(&mut self, command: CommandId, id: u64, told: Vec<VmId>) {
        self.pending.insert(
            command,
            Pending {
                id,
                waiting: told.into_iter().collect(),
                cut: 0,
            },
        );
        self.settle(|_| {});
    }

    fn done(&mut self, vm: VmId, command: CommandId, cut: u64) {
        let Some(pending) = self.pending.get_mut(&command) else {
            return;
        };
        if pending.waiting.remove(&vm) {
            pending.cut += cut;
        }
        if pending.waiting.is_empty()
            && let Some(done) = self.pending.remove(&command)
        {
            self.acknowledge(done.id, done.cut, None, None);
        }
    }

    /// Changes who is waited for, and acknowledges what nobody is waited for any more, oldest first.
    fn settle(&mut self, change: impl Fn(&mut HashSet<VmId>)) {
        let mut done: Vec<CommandId> = Vec::new();
        for (command, pending) in &mut self.pending {
            change(&mut pending.waiting);
            if pending.waiting.is_empty() {
                done.push(*command);
            }
        }
        done.sort_unstable();
        for command in done {
            if let Some(done) = self.pending.remove(&command) {
                self.acknowledge(done.id, done.cut, None, None);
            }
        }
    }

    fn acknowledge(
        &mut self,
        command_id: u64,
        cut: u64,
        forward: Option<v1::Forward>,
        error: Option<Refusal>,
    ) {
        let error = error.map(|refusal| v1::CommandError {
            code: (refusal.code as i32).cast_unsigned(),
            text: refusal.text,
        });
        self.outbox.push_back(Message::Ack(v1::Ack {
            command_id,
            error,
            cut_flows: cut,
            forward,
        }));
    }

    fn refuse_malformed(&mut self, command_id: u64, what: &str) -> String {
        self.acknowledge(command_id, 0, None, Some(Refusal::invalid(what)));
        what.to_owned()
    }

    /// Queues a report's message, or keeps it for later where nobody would know of it otherwise.
    fn send(&mut self, message: Option<Message>) {
        let Some(message) = message else { return };
        match self.link {
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

    /// A flow that a reconnect would not mention could never be cut again: it ends now.
    fn cut_unmirrored(&mut self, flow: FlowId) {
        self.last_command += 1;
        let order = Order::Cut {
            command: CommandId(self.last_command),
            flows: vec![flow],
        };
        self.router.send(vm_of_flow(flow), Input::Order(order));
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

    fn forwards(&self) -> Vec<v1::Forward> {
        let forwards = self.commands.forwards.list();
        forwards
            .iter()
            .map(|f| wire::forward_to_wire(f, &self.identity.network))
            .collect()
    }

    fn zones(&self) -> Vec<v1::Zone> {
        let zones = self.commands.zones.zones();
        zones
            .iter()
            .map(|z| wire::zone_to_wire(z, &self.identity.network))
            .collect()
    }
}

fn request(message: Message) -> v1::SessionRequest {
    v1::SessionRequest {
        message: Some(message),
    }
}

/// Takes `bytes` and some framing out of `room`, if they fit.
fn fits(room: &mut usize, bytes: usize) -> bool {
    match room.checked_sub(bytes + FIELD_BYTES) {
        Some(left) => {
            *room = left;
            true
        }
        None => false,
    }
}

fn covers(found: &Match, subject: &Subject) -> bool {
    match (found, subject) {
        (Match::Flow(found), Subject::Flow(flow)) => found.matches(&flow.key),
        (Match::Lookup(found), Subject::Lookup(lookup)) => found.matches(&lookup.name),
        _ => false,
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The version of the conversation that this is.
const PROTOCOL_VERSION: u32 = 1;
/// How long a Welcome may take.
const WELCOME_PATIENCE: Duration = Duration::from_secs(5);
/// So many heartbeat intervals without a word end a session.
const SILENT_INTERVALS: u32 = 3;
/// So many malformed messages end a session.
const NONSENSE_MAX: u32 = 16;
/// Commands that may wait for guests at once.
const COMMANDS_MAX: usize = 1024;
/// Messages queued for the stream at which no more reports are taken.
const OUTBOX_HIGH: usize = 4096;
/// Acknowledgements and repeated misses that may be queued beyond that.
const OUTBOX_SPARE: usize = 4096;
/// Refusals kept without a session.
const REFUSALS_MAX: usize = 1024;
/// How long a VM's resolver waits where nobody says.
const RESOLVER_PATIENCE: Duration = Duration::from_secs(4);
/// Bytes of a Hello, half of what gRPC takes by default, so that the estimate may be rough.
const HELLO_BYTES_MAX: usize = 2 << 20;
/// Bytes of a repeated field's tag and length, at most.
const FIELD_BYTES: usize = 8;

//! What the controlplane orders, and the acknowledgement of each: revocations, cuts, commands.
//!
//! Guests carry out what concerns them, each in its own thread; an order is acknowledged when the last
//! of them is done, or gone.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use vnet_proto::model::{CommandId, Epoch, FlowId, ForwardListen, Protocol, VmId, zone_name};
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;

use super::{Broken, Conversation};
use crate::capture::CaptureEnd;
use crate::message::{CachedVerdict, Forward, Input, Order, vm_of_flow};
use crate::session::capture::{self, Asked};
use crate::session::commands::Refusal;
use crate::session::wire;

/// A command that guests still work on.
pub(super) struct Pending {
    /// Its id on the wire. Orders carry ids of our own, because those of the wire begin anew with each
    /// session, and a late answer to an old one must not count for a new one.
    id: u64,
    waiting: HashSet<VmId>,
    cut: u64,
    /// What its acknowledgement tells of.
    about: About,
}

/// What an acknowledgement tells of.
#[derive(Default)]
enum About {
    /// Nothing.
    #[default]
    Nothing,
    /// A forward, which was asked for as such.
    Forward(v1::Forward),
    /// A range of them.
    Range(Vec<v1::Forward>),
    /// A zone, as it is now.
    Zone(v1::Zone),
}

impl Conversation {
    pub(super) fn revoke(&mut self, message: v1::Revoke) -> Result<Result<(), String>, Broken> {
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

    pub(super) fn cut(&mut self, message: &v1::Cut) -> Result<Result<(), String>, Broken> {
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

    pub(super) fn command(&mut self, message: v1::Command) {
        use v1::command::Command;
        let answer = match message.command {
            // Those that guests have a part in.
            Some(Command::ReportVerdicts(asked)) => {
                return self.report_verdicts(message.command_id, VmId(asked.vm));
            }
            Some(Command::Unexpose(forward)) => return self.unexpose(message.command_id, &forward, None),
            Some(Command::UnexposeRange(range)) => {
                let first = range.first.unwrap_or_default();
                return self.unexpose(message.command_id, &first, Some(range.count));
            }
            Some(
                command @ (Command::SetZone(_)
                | Command::MergeZone(_)
                | Command::RemoveRecords(_)
                | Command::DeleteZone(_)),
            ) => return self.change_zone(message.command_id, &command),
            Some(Command::StartCapture(asked)) => self.start_capture(&asked).map(|()| About::Nothing),
            Some(Command::StopCapture(stop)) => self.stop_capture(&stop.token).map(|()| About::Nothing),
            Some(Command::Expose(forward)) => self.expose(&forward, None),
            Some(Command::ExposeRange(range)) => {
                self.expose(&range.first.unwrap_or_default(), Some(range.count))
            }
            None => Err(Refusal::new(
                tonic::Code::Unimplemented,
                "the command is none that this version knows",
            )),
        };
        let (about, error) = match answer {
            Ok(about) => (about, None),
            Err(refusal) => (About::Nothing, Some(refusal)),
        };
        self.acknowledge(message.command_id, 0, about, error);
    }

    fn change_zone(&mut self, command_id: u64, command: &v1::command::Command) {
        use v1::command::Command;
        let zones = &self.commands.zones;
        let changed = match command {
            Command::SetZone(zone) => {
                wire::zone_from_wire(zone).and_then(|zone| zones.set_zone(zone.clone()).map(|()| Some(zone)))
            }
            Command::MergeZone(zone) => {
                wire::zone_from_wire(zone).and_then(|zone| zones.merge_zone(zone).map(Some))
            }
            Command::RemoveRecords(zone) => wire::zone_from_wire(zone)
                .and_then(|zone| zones.remove_records(zone.name.as_ref(), &zone.records).map(Some)),
            Command::DeleteZone(zone) => zone_name(&zone.name)
                .map_err(|error| Refusal::invalid(error.to_string()))
                .and_then(|name| zones.delete_zone(name.as_ref()).map(|()| None)),
            Command::Expose(_)
            | Command::ExposeRange(_)
            | Command::Unexpose(_)
            | Command::UnexposeRange(_)
            | Command::StartCapture(_)
            | Command::StopCapture(_)
            | Command::ReportVerdicts(_) => return,
        };
        match changed {
            Ok(Some(zone)) => {
                let about = About::Zone(wire::zone_to_wire(&zone, ""));
                self.acknowledge(command_id, 0, about, None);
            }
            Ok(None) => self.acknowledge(command_id, 0, About::Nothing, None),
            Err(refusal) => self.acknowledge(command_id, 0, About::Nothing, Some(refusal)),
        }
    }

    fn start_capture(&mut self, asked: &v1::StartCapture) -> Result<(), Refusal> {
        self.captures
            .retain(|_, capture| capture.upgrade().is_some_and(|capture| capture.end().is_none()));
        if capture::token(&asked.token).is_ok_and(|token| self.captures.contains_key(&token)) {
            return Err(Refusal::invalid("token is another capture's"));
        }
        let asked = Asked::begin(asked, &*self.commands.captures)?;
        self.captures
            .insert(asked.token(), Arc::downgrade(asked.capture()));
        self.to_send.push(asked);
        Ok(())
    }

    /// One that is over already is as good as stopped.
    fn stop_capture(&mut self, token: &[u8]) -> Result<(), Refusal> {
        let asked = self.captures.remove(&capture::token(token)?);
        if let Some(capture) = asked.and_then(|capture| capture.upgrade()) {
            capture.stop(CaptureEnd::Stopped);
        }
        Ok(())
    }

    /// Asks a guest for what its cache holds.
    fn report_verdicts(&mut self, id: u64, vm: VmId) {
        let Ok(command) = self.next_command() else {
            return self.acknowledge(id, 0, About::Nothing, Some(busy()));
        };
        if !self
            .router
            .send(vm, Input::Order(Order::ReportVerdicts { command }))
        {
            let gone = Refusal::new(tonic::Code::NotFound, "there is no guest of this handle");
            return self.acknowledge(id, 0, About::Nothing, Some(gone));
        }
        self.wait_for(command, id, vec![vm]);
    }

    /// A guest said what its cache holds.
    pub(super) fn verdicts_reported(
        &mut self,
        command: CommandId,
        verdicts: &[CachedVerdict],
        in_all: usize,
    ) {
        let Some(done) = self.pending.remove(&command) else {
            return;
        };
        self.outbox.push_back(Message::Ack(v1::Ack {
            command_id: done.id,
            verdicts: verdicts.iter().map(wire::cached_to_wire).collect(),
            verdicts_in_all: in_all as u64,
            ..Default::default()
        }));
    }

    /// Opens one, or a range.
    fn expose(&self, message: &v1::Forward, count: Option<u32>) -> Result<About, Refusal> {
        let first = wire::forward_from_wire(message)?;
        let opened = self.commands.expose(&first, count.unwrap_or(1))?;
        Ok(self.about_forwards(&opened, count.is_some()))
    }

    /// Closes one, or a range. It is acknowledged when every guest has cut what came through.
    fn unexpose(&mut self, id: u64, message: &v1::Forward, count: Option<u32>) {
        let command = self.next_command().map_err(|_| busy());
        let closed = command.and_then(|command| {
            let (protocol, listen) = wire::forward_key_from_wire(message)?;
            let wanted = listens(protocol, &listen, count.unwrap_or(1))?;
            let (forwards, told) = self.commands.forwards.unexpose(&wanted, command)?;
            Ok((command, forwards, told))
        });
        match closed {
            Ok((command, forwards, told)) => {
                let about = self.about_forwards(&forwards, count.is_some());
                self.wait_with(command, id, told, about);
            }
            Err(refusal) => self.acknowledge(id, 0, About::Nothing, Some(refusal)),
        }
    }

    fn about_forwards(&self, forwards: &[Forward], is_range: bool) -> About {
        let mut messages = forwards
            .iter()
            .map(|f| wire::forward_to_wire(f, &self.identity.network));
        if is_range {
            return About::Range(messages.collect());
        }
        messages.next().map_or(About::Nothing, About::Forward)
    }

    fn next_command(&mut self) -> Result<CommandId, Broken> {
        if self.pending.len() >= COMMANDS_MAX {
            return Err(Broken::Commands);
        }
        self.last_command += 1;
        Ok(CommandId(self.last_command))
    }

    fn wait_for(&mut self, command: CommandId, id: u64, told: Vec<VmId>) {
        self.wait_with(command, id, told, About::Nothing);
    }

    fn wait_with(&mut self, command: CommandId, id: u64, told: Vec<VmId>, about: About) {
        self.pending.insert(
            command,
            Pending {
                id,
                waiting: told.into_iter().collect(),
                cut: 0,
                about,
            },
        );
        self.settle(|_| {});
    }

    pub(super) fn done(&mut self, vm: VmId, command: CommandId, cut: u64) {
        let Some(pending) = self.pending.get_mut(&command) else {
            return;
        };
        if pending.waiting.remove(&vm) {
            pending.cut += cut;
        }
        if pending.waiting.is_empty()
            && let Some(done) = self.pending.remove(&command)
        {
            self.acknowledge(done.id, done.cut, done.about, None);
        }
    }

    /// Changes who is waited for, and acknowledges what nobody is waited for any more, oldest first.
    pub(super) fn settle(&mut self, change: impl Fn(&mut HashSet<VmId>)) {
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
                self.acknowledge(done.id, done.cut, done.about, None);
            }
        }
    }

    fn acknowledge(&mut self, command_id: u64, cut: u64, about: About, error: Option<Refusal>) {
        let mut ack = v1::Ack {
            command_id,
            error: error.map(wire::command_error),
            cut_flows: cut,
            ..Default::default()
        };
        match about {
            About::Nothing => {}
            About::Forward(forward) => ack.forward = Some(forward),
            About::Range(forwards) => ack.forwards = forwards,
            About::Zone(zone) => ack.zone = Some(zone),
        }
        self.outbox.push_back(Message::Ack(ack));
    }

    fn refuse_malformed(&mut self, command_id: u64, what: &str) -> String {
        self.acknowledge(command_id, 0, About::Nothing, Some(Refusal::invalid(what)));
        what.to_owned()
    }

    /// A flow that a reconnect would not mention could never be cut again: it ends now.
    pub(super) fn cut_unmirrored(&mut self, flow: FlowId) {
        self.last_command += 1;
        let order = Order::Cut {
            command: CommandId(self.last_command),
            flows: vec![flow],
        };
        self.router.send(vm_of_flow(flow), Input::Order(order));
    }
}

/// Where the forwards of a range listen.
fn listens(
    protocol: Protocol,
    first: &ForwardListen,
    count: u32,
) -> Result<Vec<(Protocol, ForwardListen)>, Refusal> {
    let refused = || Refusal::invalid(format!("{count} ports from {first} on is no range of forwards"));
    let ports = u16::try_from(count)
        .ok()
        .filter(|ports| *ports > 0)
        .ok_or_else(refused)?;
    let listen = |port| first.further(port).map(|listen| (protocol, listen));
    (0..ports).map(listen).collect::<Option<_>>().ok_or_else(refused)
}

fn busy() -> Refusal {
    Refusal::new(
        tonic::Code::ResourceExhausted,
        format!("{COMMANDS_MAX} commands wait for guests already; try again"),
    )
}

/// Commands that may wait for guests at once.
pub(super) const COMMANDS_MAX: usize = 1024;

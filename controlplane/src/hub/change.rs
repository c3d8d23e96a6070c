//! Changes: whatever can alter a decision raises the epoch, revokes what was decided before on every
//! dataplane concerned, cuts live flows that are no longer allowed, and decides open questions anew.

use std::collections::{HashMap, HashSet};

use tokio::sync::oneshot;
use vnet_proto::model::{CommandId, FlowId};
use vnet_proto::v1;

use super::{ACK_WAIT, Hub, State};
use crate::clock::Now;
use crate::fleet::{Dataplane, DataplaneNo, LiveFlow, OUTSTANDING_MAX, Outstanding, Vm};
use crate::policy::Outcome;

/// A change that is not yet acknowledged everywhere.
#[derive(Debug, Default)]
pub(super) struct Change {
    waiting: HashMap<DataplaneNo, usize>,
    acknowledged: u32,
    silent: Vec<String>,
    flows: u64,
    cut_on: HashSet<DataplaneNo>,
    done: Option<oneshot::Sender<()>>,
}

/// Stands for a change that somebody waits for.
#[derive(Debug)]
pub struct Ticket {
    id: u64,
    done: oneshot::Receiver<()>,
}

impl Ticket {
    /// The change, for what carries it out.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl Hub {
    /// Waits, for a bounded time, until every dataplane concerned has acknowledged a change.
    pub async fn report(&self, ticket: Ticket) -> v1::CutReport {
        let in_time = tokio::time::timeout(ACK_WAIT, ticket.done).await.is_ok();
        if !in_time {
            self.metrics.changes_unacknowledged.add(1);
        }
        self.read(|state, _| {
            let Some(change) = state.changes.remove(&ticket.id) else {
                return v1::CutReport::default();
            };
            let mut silent = change.silent;
            let names = change
                .waiting
                .keys()
                .filter_map(|n| state.fleet.dataplanes.get(n));
            silent.extend(names.map(|d| d.name.clone()));
            silent.sort();
            silent.dedup();
            v1::CutReport {
                flows: change.flows,
                dataplanes_acknowledged: change.acknowledged,
                dataplanes_silent: silent,
                dataplanes_cut: u32::try_from(change.cut_on.len()).unwrap_or(u32::MAX),
            }
        })
    }
}

impl State {
    /// Prepares to wait for a change; give the id to [`State::change`].
    pub(super) fn ticket(&mut self) -> Ticket {
        let (done, wait) = oneshot::channel();
        self.last_change += 1;
        self.changes.insert(
            self.last_change,
            Change {
                done: Some(done),
                ..Change::default()
            },
        );
        Ticket {
            id: self.last_change,
            done: wait,
        }
    }

    /// Something that concerns these VMs changed, and everything that it changed is in place.
    pub(super) fn change(
        &mut self,
        now: Now,
        ticket: Option<&Ticket>,
        concerns: impl Fn(&Vm) -> bool,
        text: &str,
    ) {
        let id = ticket.map(|t| t.id);
        self.revoke(id, &concerns);
        self.cut_disallowed(id, &concerns, text);
        self.decide_pending(now);
        if let Some(id) = id {
            self.finish_if_done(id);
        }
    }

    /// Raises the epoch, and voids what was decided before wherever it concerns a VM.
    pub(super) fn revoke(&mut self, id: Option<u64>, concerns: impl Fn(&Vm) -> bool) {
        self.epoch = self.epoch.next();
        let epoch = self.epoch;
        let vms = &self.fleet.vms;
        for (number, dataplane) in &mut self.fleet.dataplanes {
            if !dataplane
                .vms
                .values()
                .filter_map(|name| vms.get(name))
                .any(&concerns)
            {
                continue;
            }
            dataplane.epoch = epoch;
            let command = dataplane.next_command();
            let message = v1::session_response::Message::Revoke(v1::Revoke {
                command_id: command.0,
                epoch: Some(epoch.into()),
            });
            let sent = dataplane.send(message);
            track(&mut self.changes, id, *number, dataplane, command, sent);
        }
    }

    /// Cuts live flows of these VMs, and of others to them, that are no longer allowed.
    pub(super) fn cut_disallowed(&mut self, id: Option<u64>, concerns: impl Fn(&Vm) -> bool, text: &str) {
        let concerned: HashSet<String> = self
            .fleet
            .vms
            .values()
            .filter(|vm| concerns(vm))
            .map(|vm| vm.view.name.clone())
            .collect();
        let is_concerned =
            |flow: &LiveFlow| concerned.contains(&flow.vm) || concerned.contains(flow.peer.as_str());
        let openers = self
            .fleet
            .dataplanes
            .values()
            .flat_map(|dataplane| dataplane.flows.values())
            .filter(|flow| concerned.contains(flow.peer.as_str()))
            .map(|flow| flow.vm.clone());
        let judged: HashSet<String> = concerned.iter().cloned().chain(openers).collect();
        for name in &judged {
            self.refresh_grants(name);
        }
        let mut cuts: Vec<(DataplaneNo, Vec<FlowId>)> = Vec::new();
        for (number, dataplane) in &self.fleet.dataplanes {
            let flows: Vec<FlowId> = dataplane
                .flows
                .iter()
                .filter(|(_, flow)| is_concerned(flow))
                .filter(|(_, flow)| !self.is_allowed(*number, flow))
                .map(|(id, _)| *id)
                .collect();
            if !flows.is_empty() {
                cuts.push((*number, flows));
            }
        }
        for (number, flows) in cuts {
            self.cut(id, number, flows, text);
        }
        self.close_forwards(id, |_, forward| concerned.contains(&forward.asked_by));
    }

    /// Cuts flows.
    pub(super) fn cut(&mut self, id: Option<u64>, number: DataplaneNo, flows: Vec<FlowId>, text: &str) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) else {
            return;
        };
        self.metrics.flows_cut.add(flows.len() as u64);
        let command = dataplane.next_command();
        let message = v1::session_response::Message::Cut(v1::Cut {
            command_id: command.0,
            flow_ids: flows.iter().map(|f| f.0).collect(),
            text: text.to_owned(),
        });
        let sent = dataplane.send(message);
        track(&mut self.changes, id, number, dataplane, command, sent);
    }

    /// Decides open questions anew; whatever is no longer one is answered.
    pub(super) fn decide_pending(&mut self, now: Now) -> usize {
        let names: Vec<String> = self.fleet.vms.keys().cloned().collect();
        for name in &names {
            self.refresh_grants(name);
        }
        let fleet = &self.fleet;
        let changes = self.pending.decide_again(
            now.steady,
            |view, subject| {
                super::decide::decide(fleet, &view.name, subject)
                    .is_none_or(|decision| decision.outcome == Outcome::Ask)
            },
            |view, forward| super::forwards::still_asks(fleet, &view.name, forward),
        );
        let closed = changes
            .changes
            .iter()
            .filter(|c| matches!(c, crate::approval::Change::Removed(_)))
            .count();
        self.take_up(now, changes);
        closed
    }

    /// A dataplane did, or refused, what it was told.
    pub(super) fn handle_ack(&mut self, now: Now, number: DataplaneNo, ack: v1::Ack) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) else {
            return;
        };
        match dataplane.outstanding.remove(&CommandId(ack.command_id)) {
            None => self.metrics.stray.add(1),
            Some(Outstanding::Change(None)) => {}
            Some(Outstanding::Change(Some(id))) => self.change_acknowledged(number, id, &ack),
            Some(Outstanding::Command {
                command,
                reply,
                change,
            }) => {
                if let Some(id) = change {
                    self.change_acknowledged(number, id, &ack);
                }
                self.command_done(now, number, command, reply, ack);
            }
        }
    }

    fn change_acknowledged(&mut self, number: DataplaneNo, id: u64, ack: &v1::Ack) {
        let Some(dataplane) = self.fleet.dataplanes.get(&number) else {
            return;
        };
        if let Some(change) = self.changes.get_mut(&id) {
            change.flows += ack.cut_flows;
            if ack.cut_flows > 0 {
                change.cut_on.insert(number);
            }
            if let Some(left) = change.waiting.get_mut(&number) {
                *left -= 1;
                if *left == 0 {
                    change.waiting.remove(&number);
                    if ack.error.is_some() {
                        change.silent.push(dataplane.name.clone());
                    } else {
                        change.acknowledged += 1;
                    }
                }
            }
        }
        self.finish_if_done(id);
    }

    /// A change waits for a command that was sent.
    pub(super) fn wait_for_command(&mut self, id: Option<u64>, number: DataplaneNo) {
        if let Some(change) = id.and_then(|id| self.changes.get_mut(&id)) {
            *change.waiting.entry(number).or_default() += 1;
        }
    }

    /// A dataplane's session is gone: what it did not acknowledge, it will not.
    pub(super) fn give_up_outstanding(&mut self, number: DataplaneNo) {
        let Some(dataplane) = self.fleet.dataplanes.get_mut(&number) else {
            return;
        };
        let name = dataplane.name.clone();
        let outstanding: Vec<Outstanding> = dataplane.outstanding.drain().map(|(_, o)| o).collect();
        for item in outstanding {
            // The waiter of a command sees its sender dropped.
            if let Outstanding::Change(Some(id)) | Outstanding::Command { change: Some(id), .. } = item {
                if let Some(change) = self.changes.get_mut(&id)
                    && change.waiting.remove(&number).is_some()
                {
                    change.silent.push(name.clone());
                }
                self.finish_if_done(id);
            }
        }
    }

    /// Tells who waits for a change, if every dataplane that was told of it has done it.
    pub(super) fn finish_if_done(&mut self, id: u64) {
        if let Some(change) = self.changes.get_mut(&id)
            && change.waiting.is_empty()
            && let Some(done) = change.done.take()
        {
            // Nobody waiting is a client that went away; its entry goes with it.
            if done.send(()).is_err() {
                self.changes.remove(&id);
            }
        }
    }

    /// The change whose Revoke a dataplane has yet to acknowledge: a flow that it reports meanwhile
    /// and that must go counts for it.
    pub(super) fn open_change_of(&self, number: DataplaneNo) -> Option<u64> {
        let outstanding = &self.fleet.dataplanes.get(&number)?.outstanding;
        outstanding
            .values()
            .filter_map(|o| {
                if let Outstanding::Change(id) = o {
                    *id
                } else {
                    None
                }
            })
            .max()
    }
}

fn track(
    changes: &mut HashMap<u64, Change>,
    id: Option<u64>,
    number: DataplaneNo,
    dataplane: &mut Dataplane,
    command: CommandId,
    sent: bool,
) {
    let change = id.and_then(|id| changes.get_mut(&id));
    if sent {
        dataplane.outstanding.insert(command, Outstanding::Change(id));
        if let Some(change) = change {
            *change.waiting.entry(number).or_default() += 1;
        }
    } else if let Some(change) = change
        && !change.silent.contains(&dataplane.name)
    {
        change.silent.push(dataplane.name.clone());
    }
}

impl Dataplane {
    /// A fresh id for a command.
    pub(super) fn next_command(&mut self) -> CommandId {
        self.last_command += 1;
        CommandId(self.last_command)
    }

    /// Leaves a message to the session; false if it is lost, or was ended for reading too slowly.
    pub(super) fn send(&mut self, message: v1::session_response::Message) -> bool {
        let Some(link) = &mut self.link else { return false };
        let response = v1::SessionResponse {
            message: Some(message),
        };
        if self.outstanding.len() < OUTSTANDING_MAX && link.outbox.try_send(response).is_ok() {
            return true;
        }
        if let Some(end) = link.end.take() {
            // Its task may have ended by itself, which is as well.
            let _ = end.send(tonic::Status::resource_exhausted(
                "the dataplane reads too slowly",
            ));
        }
        false
    }
}

//! Forwards that VMs ask for themselves: decided and opened in one step, asked of a person where the policy says so,
//! judged anew at each change, and closed where they are no longer allowed, or their VM is gone.
//!
//! Which VM asked, and on which grant a forward rests, travels with the forward, so that it is known after a
//! reconnect and after a restart of either side.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use vnet_proto::model::{ForwardListen, ForwardTarget, Protocol, Reason, VmId};
use vnet_proto::v1;
use vnet_proto::v1::command::Command;

use super::decide::context;
use super::events::about;
use super::repeats::Key;
use super::{Hub, State, ids};
use crate::approval::{AskForward, AskOutcome, OPEN_PER_VM_MAX, PendingId};
use crate::clock::Now;
use crate::fleet::{Dataplane, DataplaneNo, Fleet, Outstanding, Vm, no_vm};
use crate::grant::{GrantId, Use, VmInstance};
use crate::policy::{ForwardDecision, Outcome, decide_forward, on_loopback};
use crate::refusal::Refusal;

/// Calls for one VM that wait for answers at once; one more is refused, and nobody is asked. It is less than the
/// connections that a guest has to whom it asks, so that what waits does not keep it from all else.
pub const WAITS_PER_VM_MAX: usize = 12;

/// A forward that a VM asks for.
#[derive(Debug, Clone)]
pub struct ForwardWish {
    /// The network; empty where there is only one.
    pub network: String,
    /// The VM's name; empty: its handle says which.
    pub vm: String,
    /// Its dataplane's handle of it.
    pub handle: VmId,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where on the host.
    pub listen: SocketAddr,
    /// The address there was not said: under a policy or mode it is the loopback's of that family.
    pub any_address: bool,
    /// One of the VM's addresses, and its port.
    pub target: SocketAddr,
}

/// What comes next for a wish.
enum Step {
    /// The dataplane is opening it.
    Opening(oneshot::Receiver<Result<v1::Ack, Refusal>>, v1::Forward),
    /// A person is asked.
    Asking {
        id: PendingId,
        /// What is asked, for a message.
        what: String,
        hold: Duration,
        /// Its sender is dropped when the request ends.
        ended: oneshot::Receiver<()>,
    },
}

impl Hub {
    /// Decides a forward that a VM asks for, and opens it. Where a person is to be asked it waits, for as long as the
    /// policy's `approvalTimeout` says.
    ///
    /// # Errors
    /// [`Refusal`]: it is not open. After [`Refusal::Unanswered`] the request is still open.
    pub async fn request_forward(&self, wish: &ForwardWish) -> Result<v1::Forward, Refusal> {
        let mut deadline = None;
        loop {
            match self.read(|state, now| state.try_forward(now, wish))? {
                Step::Opening(wait, asked) => {
                    let ack = Self::acknowledged(wait).await?;
                    return Ok(ack.forward.unwrap_or(asked));
                }
                Step::Asking {
                    id,
                    what,
                    hold,
                    ended,
                } => {
                    let until = *deadline.get_or_insert_with(|| Instant::now() + hold);
                    if tokio::time::timeout_at(until, ended).await.is_err() {
                        return Err(Refusal::Unanswered(format!(
                            "{what}, and nobody answered; the request is still open: answer with vnetctl approve \
                             {id} (or deny), and ask again"
                        )));
                    }
                }
            }
        }
    }
}

impl State {
    fn try_forward(&mut self, now: Now, wish: &ForwardWish) -> Result<Step, Refusal> {
        let (number, name) = self.asker(wish)?;
        self.refresh_grants(&name);
        let (Some(vm), Some(dataplane)) = (self.fleet.vms.get(&name), self.fleet.dataplanes.get(&number))
        else {
            return Err(no_vm(&name));
        };
        let target = wish.target.ip().to_canonical();
        if !self.may_be_own(vm, dataplane, target) {
            let text =
                format!("{target} is not an address of VM {name}, and a VM opens ports to itself alone");
            return Err(Refusal::Denied(text));
        }
        let context = context(vm, &dataplane.guarded, None);
        let listen = if wish.any_address && context.policy.mode().is_some() {
            on_loopback(wish.listen)
        } else {
            wish.listen
        };
        let decision = decide_forward(&context, wish.protocol, listen, wish.target.port());
        match decision.outcome {
            Outcome::Allow => {
                let forward = v1::Forward {
                    network: dataplane.network.clone(),
                    protocol: v1::Protocol::from(wish.protocol).into(),
                    listen: listen.to_string(),
                    target: wish.target.to_string(),
                    asked_by: name,
                    grant_id: decision.grant.map(|grant| grant.id.0.clone()).unwrap_or_default(),
                    ..Default::default()
                };
                let asked = forward.clone();
                let wait = self.send_command(number, None, |_| Command::Expose(forward))?;
                Ok(Step::Opening(wait, asked))
            }
            Outcome::Ask => match decision.target {
                Some(target) => self.ask_forward(now, &name, target, decision.reason),
                // What cannot be asked for is never asked.
                None => Err(self.refuse_forward(now, &name, wish, listen, decision)),
            },
            Outcome::Deny | Outcome::Drop => Err(self.refuse_forward(now, &name, wish, listen, decision)),
        }
    }

    /// Whether an address is a VM's own. Those that a guest speaks from are told a moment later: while none of a subnet
    /// is known of it, one there that nobody else has may be. Should it turn out to be another's, what leads there is
    /// closed.
    fn may_be_own(&self, vm: &Vm, dataplane: &Dataplane, address: IpAddr) -> bool {
        if has(vm, address) {
            return true;
        }
        let Some(subnet) = dataplane.subnets.iter().find(|net| net.contains(&address)) else {
            return false;
        };
        let is_known = |own: &String| own.parse().is_ok_and(|own: IpAddr| subnet.contains(&own));
        let is_the_networks = dataplane.gateway == Some(address) || dataplane.nat.contains_key(&address);
        let mut others = dataplane.vms.values().filter_map(|name| self.fleet.vms.get(name));
        !vm.addresses.iter().any(is_known) && !is_the_networks && !others.any(|other| has(other, address))
    }

    /// Who asks, and on which dataplane.
    fn asker(&self, wish: &ForwardWish) -> Result<(DataplaneNo, String), Refusal> {
        if wish.vm.is_empty() {
            let number = self.fleet.dataplane_of_network(&wish.network)?;
            let vm = self.fleet.vm_of(number, wish.handle).ok_or_else(|| {
                let handle = wish.handle.0;
                Refusal::NotFound(format!("the network has no VM with handle {handle}"))
            })?;
            return Ok((number, vm.view.name.clone()));
        }
        let vm = self.fleet.vm(&wish.vm)?;
        let network = self.fleet.dataplanes.get(&vm.dataplane).map(|d| &d.network);
        if !wish.network.is_empty() && network != Some(&wish.network) {
            let text = format!("VM {} is not on network {:?}", wish.vm, wish.network);
            return Err(Refusal::NotFound(text));
        }
        Ok((vm.dataplane, wish.vm.clone()))
    }

    fn ask_forward(
        &mut self,
        now: Now,
        name: &str,
        forward: ForwardTarget,
        reason: Reason,
    ) -> Result<Step, Refusal> {
        self.last_request = self.last_request.wrapping_add(1);
        let vm = self.fleet.vm(name)?;
        let what = format!("{name} asks {}", forward.in_words());
        if self.forward_waits_of(&vm.view.instance) >= WAITS_PER_VM_MAX {
            self.metrics.forward_waits_refused.add(1);
            let text = format!(
                "VM {name} waits for answers about {WAITS_PER_VM_MAX} forwards already, which is the most; answer or \
                 deny those first: vnetctl pending list"
            );
            let event = about(v1::EventKind::LimitReached, name, format!("{what}: {text}"));
            self.repeated_event(now, Key::limit(&text), 1, event);
            return Err(Refusal::Waiting(text));
        }
        let said = vm.effective.settings();
        let hold = vm.effective.approval_timeout();
        let ask = AskForward {
            id: PendingId(ids::spread(self.last_request)),
            vm: &vm.view,
            forward,
            reason,
            hold,
            open_max: said.max_pending.map_or(OPEN_PER_VM_MAX, |most| most as usize),
            per_minute_max: said.max_per_minute.map(|most| most as usize),
        };
        let (outcome, changes) = self.pending.ask_forward(now.steady, ask);
        self.take_up(now, changes);
        match outcome {
            AskOutcome::Opened(id) | AskOutcome::Joined(id) => {
                let waits = self.forward_waits.entry(id.clone()).or_default();
                waits.retain(|wait| !wait.is_closed());
                let (sender, ended) = oneshot::channel();
                waits.push(sender);
                Ok(Step::Asking {
                    id,
                    what,
                    hold,
                    ended,
                })
            }
            AskOutcome::Refused {
                limit: _,
                count,
                reason,
            } => {
                let text = format!("{what}: {}", reason.text);
                let event = about(v1::EventKind::LimitReached, name, text);
                self.ask_refused(now, count, &reason, event);
                Err(Refusal::Limit(reason.text))
            }
        }
    }

    /// How many calls wait for answers about forwards of one VM.
    fn forward_waits_of(&self, instance: &VmInstance) -> usize {
        let of_vm = |id: &PendingId| self.pending.get(id).is_some_and(|r| r.vm.instance == *instance);
        let waits = self.forward_waits.iter().filter(|(id, _)| of_vm(id));
        waits
            .flat_map(|(_, waits)| waits)
            .filter(|wait| !wait.is_closed())
            .count()
    }

    /// Records that a forward was refused, and says so.
    fn refuse_forward(
        &mut self,
        now: Now,
        name: &str,
        wish: &ForwardWish,
        listen: SocketAddr,
        decision: ForwardDecision,
    ) -> Refusal {
        if let Some(grant) = &decision.grant {
            self.use_grant(now, &grant.id.clone(), Use::Flow);
        }
        let (protocol, port) = (wish.protocol, wish.target.port());
        let reason = decision.reason;
        let text = format!(
            "{name} asked to open {protocol} {listen} to its port {port}: {}",
            reason.text
        );
        let event = v1::Event {
            action: v1::Action::Deny.into(),
            reason: Some((&reason).into()),
            ..about(v1::EventKind::ForwardDenied, name, text)
        };
        self.repeated_event(now, Key::forward(protocol, listen, port, &reason), 1, event);
        Refusal::Denied(format!("{protocol} {listen} is not opened: {}", reason.text))
    }

    /// A dataplane opened a forward: what it rests on is used, and may be gone by now, as may be who asked for it.
    pub(super) fn forward_opened(&mut self, now: Now, number: DataplaneNo, forward: &v1::Forward) {
        if forward.asked_by.is_empty() {
            return;
        }
        if !forward.grant_id.is_empty() {
            self.use_grant(now, &GrantId(forward.grant_id.clone()), Use::Flow);
        }
        let asker = forward.asked_by.as_str();
        if self.asker_on(number, asker).is_none() {
            return self.close(None, vec![(number, forward.clone())]);
        }
        self.close_forwards(None, |_, other| other.asked_by == asker);
    }

    /// A VM is gone for good. What it asked for under a policy or a mode goes with it: it is for nobody else who has its
    /// name or its address next.
    pub(super) fn asker_gone(&mut self, number: DataplaneNo, name: &str, was_judged: bool) {
        let Some(dataplane) = self.fleet.dataplanes.get(&number) else {
            return;
        };
        let asked = dataplane
            .forwards
            .iter()
            .filter(|forward| forward.asked_by == name);
        let over = asked.filter(|forward| was_judged || !self.may_stay(number, forward));
        let over = over.map(|forward| (number, forward.clone())).collect();
        self.close(None, over);
    }

    /// A VM came, or its addresses are others, or it is away or back: closes what leads there and is no longer its
    /// asker's, and what it asked for itself where that is no longer allowed.
    pub(super) fn close_moved(&mut self, number: DataplaneNo, name: &str, addresses: &[String]) {
        self.close_forwards(None, |at, forward| {
            let leads_there = || {
                let target = target_of(forward).map(|address| address.to_string());
                target.is_none_or(|address| addresses.contains(&address))
            };
            at == number && (forward.asked_by == name || leads_there())
        });
    }

    /// Closes forwards that are concerned and no longer allowed, of those that VMs asked for. Those of VMs that are gone
    /// are judged as well.
    pub(super) fn close_forwards(
        &mut self,
        change: Option<u64>,
        concerns: impl Fn(DataplaneNo, &v1::Forward) -> bool,
    ) {
        let mut judged: Vec<(DataplaneNo, v1::Forward)> = Vec::new();
        for (number, dataplane) in &self.fleet.dataplanes {
            let asked = dataplane.forwards.iter().filter(|forward| {
                let asker = forward.asked_by.as_str();
                !asker.is_empty() && (concerns(*number, forward) || self.asker_on(*number, asker).is_none())
            });
            judged.extend(asked.map(|forward| (*number, forward.clone())));
        }
        // What was granted may have ended since they were last asked about.
        for (_, forward) in &judged {
            self.refresh_grants(&forward.asked_by);
        }
        judged.retain(|(number, forward)| !self.may_stay(*number, forward));
        self.close(change, judged);
    }

    fn close(&mut self, change: Option<u64>, closing: Vec<(DataplaneNo, v1::Forward)>) {
        for (number, forward) in closing {
            // One that is being closed needs not be told again.
            if self.is_closing(number, &forward) {
                continue;
            }
            let listen = forward.listen.clone();
            // Nobody waits for the answer itself. One that is lost is closed when it is back.
            match self.send_command(number, change, |_| Command::Unexpose(forward)) {
                Ok(_) => tracing::info!(listen, "a forward is closed, as it is no longer allowed"),
                Err(refusal) => tracing::debug!(listen, %refusal, "a forward could not be closed"),
            }
        }
    }

    fn is_closing(&self, number: DataplaneNo, forward: &v1::Forward) -> bool {
        let dataplane = self.fleet.dataplanes.get(&number);
        dataplane.is_some_and(|dataplane| {
            dataplane.outstanding.values().any(|outstanding| {
                matches!(outstanding, Outstanding::Command { command: Command::Unexpose(other), .. }
                    if other.protocol == forward.protocol && other.listen == forward.listen)
            })
        })
    }

    /// Who asked for a forward of a dataplane; `None`: it is gone for good.
    fn asker_on(&self, number: DataplaneNo, name: &str) -> Option<&Vm> {
        self.fleet.vms.get(name).filter(|vm| vm.dataplane == number)
    }

    fn may_stay(&self, number: DataplaneNo, forward: &v1::Forward) -> bool {
        if self.leads_to_another(number, forward) {
            return false;
        }
        let Some(vm) = self.asker_on(number, &forward.asked_by) else {
            // What it was under is not known any more: only where nobody is under anything, it was not either.
            return forward.grant_id.is_empty() && !self.secure_mode && self.policies.is_empty();
        };
        let Some(decision) = self.judge_forward(vm, forward) else {
            return false;
        };
        match decision.outcome {
            Outcome::Allow => true,
            // Its grant was for this once: only what outranks any grant takes it back.
            _ => {
                let step = decision.reason.step.as_str();
                let is_told = decision.outcome != Outcome::Ask && matches!(step, "mode" | "rule" | "grant");
                !is_told && self.is_spent(&forward.grant_id)
            }
        }
    }

    /// Whether another VM than the one that asked has the address that a forward leads to. Of one that is away, what was
    /// its own may be another's by now.
    fn leads_to_another(&self, number: DataplaneNo, forward: &v1::Forward) -> bool {
        let (Some(address), Some(dataplane)) = (target_of(forward), self.fleet.dataplanes.get(&number))
        else {
            return true;
        };
        let asker = self.asker_on(number, &forward.asked_by);
        if asker.is_some_and(|vm| vm.attached && has(vm, address)) {
            return false;
        }
        let others = dataplane.vms.values().filter(|name| **name != forward.asked_by);
        others
            .filter_map(|name| self.fleet.vms.get(name))
            .any(|other| has(other, address))
    }

    fn judge_forward(&self, vm: &Vm, forward: &v1::Forward) -> Option<ForwardDecision> {
        let dataplane = self.fleet.dataplanes.get(&vm.dataplane)?;
        let protocol = Protocol::try_from(forward.protocol()).ok()?;
        let ForwardListen::Address(listen) = forward.listen.parse().ok()? else {
            return None;
        };
        let target: SocketAddr = forward.target.parse().ok()?;
        let context = context(vm, &dataplane.guarded, None);
        Some(decide_forward(&context, protocol, listen, target.port()))
    }
}

/// Whether an address is known to be a VM's.
fn has(vm: &Vm, address: IpAddr) -> bool {
    vm.addresses.contains(&address.to_string())
}

/// The address that a forward leads to, where one can be read.
fn target_of(forward: &v1::Forward) -> Option<IpAddr> {
    let target: SocketAddr = forward.target.parse().ok()?;
    Some(target.ip().to_canonical())
}

/// Whether a person is still to be asked about a forward. Of a VM that is not there, nothing is known to say otherwise.
pub(super) fn still_asks(fleet: &Fleet, name: &str, forward: &ForwardTarget) -> bool {
    let vm = fleet.vms.get(name);
    let place = vm.and_then(|vm| Some((vm, fleet.dataplanes.get(&vm.dataplane)?)));
    let Some((vm, dataplane)) = place else { return true };
    let context = context(vm, &dataplane.guarded, None);
    let decision = decide_forward(
        &context,
        forward.protocol(),
        forward.listen(),
        forward.guest_port(),
    );
    decision.outcome == Outcome::Ask
}

//! Flows whose verdict rests on a name: the guest must speak it, and what it says is read by the
//! [`inspect`](crate::engine::inspect) room.
//!
//! Where a name is *required*, a TCP flow is [`Reading`] first: the guest's handshake is completed here, its
//! bytes are looked at in the receive ring, and the host's side is dialled only when a name that may pass was
//! spoken. By then the verdict may be gone, so whatever a new flow passes is passed once more. Where a name
//! need only match *if there is one*, the host's side is dialled as for any flow, and a [`Check`] stands beside
//! the connection: server-first protocols lose no time, and no byte of the guest's goes up before it was read.
//! Either way the check stays for as long as another name may be spoken (every request of plain HTTP), and is
//! gone after that: the connection is then like any other.
//!
//! Of UDP every datagram of such a flow is shown to its inspector ([`Checked`]).

mod check;
mod datagram;

use std::sync::Arc;

use rand::Rng as _;
use vnet_proto::model::{MissId, Name, VerdictAction};

pub(super) use self::check::Check;
pub(super) use self::datagram::Checked;
use crate::engine::cache::Decision;
use crate::engine::flow::{Flow, State};
use crate::engine::inspect::{Demand, InspectRefusal, Level, NameList};
use crate::engine::judge::Wanted;
use crate::engine::stack::Connection;
use crate::engine::tcp::{DIAL_PATIENCE, DialError};
use crate::engine::{Engine, Event, Time};
use crate::message::{FlowEnd, MissEnd, NameRefusal, Report, Settings};

/// A TCP flow of which a name is required, before it is dialled.
pub struct Reading {
    /// The guest's end.
    pub(super) connection: Connection,
    /// The names bound to the destination when it was decided.
    bound: Vec<Name>,
    step: Step,
}

enum Step {
    /// The guest has to speak.
    Listening,
    /// It has spoken, but what let it through is gone: it waits for a new verdict.
    Asking { miss: MissId, deadline: Time },
    /// The host's side is being dialled.
    Dialing { deadline: Time },
}

impl Reading {
    /// The miss that it waits for, and until when.
    pub(super) fn asking(&mut self) -> Option<(&mut MissId, &mut Time)> {
        match &mut self.step {
            Step::Asking { miss, deadline } => Some((miss, deadline)),
            Step::Listening | Step::Dialing { .. } => None,
        }
    }

    /// When it wants attention whatever its connection does.
    pub(super) fn deadline(&self) -> Option<Time> {
        match &self.step {
            Step::Listening => self.connection.check.as_ref()?.deadline(),
            Step::Asking { deadline, .. } | Step::Dialing { deadline } => Some(*deadline),
        }
    }

    /// Whether its host's side is being dialled.
    pub(super) fn is_dialling(&self) -> bool {
        matches!(self.step, Step::Dialing { .. })
    }
}

impl Flow {
    /// What is demanded of it, if anything is.
    fn demand(&self, settings: &Settings) -> Option<Demand<Arc<NameList>>> {
        let decision = self.decision.as_ref()?;
        Some(Demand {
            level: decision.level(&self.key)?,
            names: Arc::clone(&decision.naming.as_ref()?.names),
            deny_ech: settings.deny_ech,
            deny_quic: settings.deny_quic,
            port: self.key.peer.port(),
        })
    }

    /// What its connection's bytes are held to.
    pub(super) fn check(&self, settings: &Settings) -> Option<Box<Check>> {
        self.demand(settings).map(|demand| Box::new(Check::new(demand)))
    }

    /// Whether nothing may be dialled before its name was read.
    pub(super) fn requires_name(&self) -> bool {
        self.decision
            .as_ref()
            .is_some_and(|decision| decision.level(&self.key) == Some(Level::Require))
    }
}

impl Engine {
    /// Answers the guest's SYN of a flow that would be dialled, to hear its name first.
    pub(super) fn begin_reading(&mut self, now: Time, at: usize) {
        let seed = self.random.next_u64();
        let slot = self.rings.take();
        let Some(to) = self.flows.get(at).map(|flow| flow.key.peer.ip()) else {
            return;
        };
        let bound = self.names_of(now, to);
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Dialing { syn, .. } = &flow.state else {
            return;
        };
        let (peer, mtu_bytes) = (flow.key.peer, self.config.mtu_bytes);
        let accepted = slot
            .and_then(|slot| Connection::accept(now, peer, mtu_bytes, slot, seed, syn, &mut self.transmit));
        let Some(mut connection) = accepted else {
            self.handle_refused(now, at, DialError::Local);
            return;
        };
        connection.check = flow.check(&self.settings);
        flow.state = State::Reading(Box::new(Reading {
            connection,
            bound,
            step: Step::Listening,
        }));
        flow.last_active = now;
        self.mark_dirty(at);
    }

    /// Looks at what the guest has said, and dials if that will do.
    pub(super) fn read_name(&mut self, now: Time, at: usize) {
        let Some(spoken) = self.hear(now, at) else { return };
        if !spoken {
            return;
        }
        let Some(flow) = self.flows.get(at) else { return };
        let State::Reading(reading) = &flow.state else {
            return;
        };
        let wanted = flow.wanted();
        let is_synthetic = self.is_synthetic(&wanted);
        // The verdict on a synthetic address is about the name; what that was resolved to was judged apart.
        let decided = if is_synthetic {
            Wanted::plain(wanted.key)
        } else {
            wanted
        };
        let stands = flow.decision.as_ref().is_some_and(|decision| {
            self.cache.stands(now, decision)
                && self.standing(&decided) == decision.standing
                && self.names_of(now, wanted.key.peer.ip()) == reading.bound
        });
        if stands {
            self.dial_read(now, at);
            return;
        }
        if is_synthetic {
            // Both judgements would have to be made again, and the guest has its answer: it may try anew.
            self.cut(now, at, FlowEnd::Cut);
            return;
        }
        match self.decide(now, &wanted) {
            Some(decision) => self.answer_reading(now, at, &decision),
            None => self.ask_reading(now, at),
        }
    }

    /// Whether something may pass by now; `None` if the flow does not listen, or is over.
    fn hear(&mut self, now: Time, at: usize) -> Option<bool> {
        let State::Reading(reading) = &mut self.flows.get_mut(at)?.state else {
            return None;
        };
        if !matches!(reading.step, Step::Listening) {
            return None;
        }
        reading.connection.inspect();
        let Some(check) = &mut reading.connection.check else {
            return Some(true);
        };
        if let Some(refusal) = check.refusal(now) {
            self.refuse_name(now, at, &refusal);
            return None;
        }
        Some(check.has_passed())
    }

    fn dial_read(&mut self, now: Time, at: usize) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let State::Reading(reading) = &mut flow.state else {
            return;
        };
        reading.step = Step::Dialing {
            deadline: now + DIAL_PATIENCE,
        };
        let to = flow.dialled;
        self.events.push_back(Event::Dial { flow: at, to });
        self.schedule(now, at);
    }

    /// A verdict for a flow whose name is read, or was. What the guest has said is held to it from the beginning.
    pub(super) fn answer_reading(&mut self, now: Time, at: usize, decision: &Arc<Decision>) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        if decision.action != VerdictAction::Allow || flow.neighbour.is_some() {
            self.cut(now, at, FlowEnd::Cut);
            return;
        }
        // The session told at its opening what the flow may speak, by which it is judged for as long as it lives: a
        // name that has come to be bound, or allowed, since then is not added to those.
        let known = flow.decision.as_ref().and_then(|before| before.naming.as_ref());
        let known = known.map_or(&[][..], |naming| &naming.names.names);
        let limited = decision.speaking_only(known);
        let none_left = limited.is_none();
        let decision = limited.unwrap_or_else(|| Arc::clone(decision));
        let before = flow.decision.replace(Arc::clone(&decision));
        let counted = before.as_ref().and_then(|before| before.meter.clone());
        let is_counted = match (&counted, &decision.meter) {
            (Some(counted), Some(meter)) => Arc::ptr_eq(counted, meter),
            (_, meter) => meter.is_none(),
        };
        flow.metered = decision.meter.is_some();
        if !is_counted {
            self.count_connection(at);
        }
        let Some(to) = self.flows.get(at).map(|flow| flow.key.peer.ip()) else {
            return;
        };
        let bound = self.names_of(now, to);
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let check = flow.check(&self.settings);
        let waits = flow.requires_name();
        let State::Reading(reading) = &mut flow.state else {
            return;
        };
        reading.connection.check = check;
        reading.bound = bound;
        reading.step = Step::Listening;
        // Where the name that it spoke is none of those, this says so.
        let spoken = self.hear(now, at);
        if none_left && spoken.is_some() {
            // The guest may try anew.
            self.cut(now, at, FlowEnd::Cut);
            return;
        }
        if spoken == Some(true) || (spoken.is_some() && !waits) {
            self.dial_read(now, at);
        } else {
            self.schedule(now, at);
        }
    }

    /// Asks anew what was decided once: nothing is dialled on a verdict that is gone.
    fn ask_reading(&mut self, now: Time, at: usize) {
        let Some(flow) = self.flows.get(at) else { return };
        let wanted = flow.wanted();
        let Some((miss, count, hold)) = self.held.join_flow(wanted.target(), at) else {
            self.cut(now, at, FlowEnd::Evicted);
            return;
        };
        if let Some(State::Reading(reading)) = self.flows.get_mut(at).map(|flow| &mut flow.state) {
            reading.step = Step::Asking {
                miss,
                deadline: now + hold,
            };
        }
        self.schedule(now, at);
        self.ask_flow(now, miss, &wanted, count, hold);
    }

    /// A flow whose name is read no longer waits for a verdict.
    pub(super) fn leave_reading(&mut self, at: usize, reading: &mut Reading, end: FlowEnd) {
        let Some((miss, _)) = reading.asking() else { return };
        let miss = *miss;
        if self.held.leave(miss, at) {
            let end = match end {
                FlowEnd::GuestReset => MissEnd::GuestGaveUp,
                FlowEnd::VmDown => MissEnd::VmDown,
                FlowEnd::Evicted => MissEnd::Evicted,
                _ => MissEnd::HoldExpired,
            };
            self.report(Report::MissEnded { miss, end });
        }
    }

    /// What a name that is read, or a new verdict, or the host's side took too long for.
    pub(super) fn handle_reading_timeout(&mut self, now: Time, at: usize) {
        let Some(State::Reading(reading)) = self.flows.get(at).map(|flow| &flow.state) else {
            return;
        };
        let over = match &reading.step {
            Step::Listening => false,
            Step::Asking { deadline, .. } | Step::Dialing { deadline } => *deadline <= now,
        };
        match (over, reading.is_dialling()) {
            (true, true) => self.handle_refused(now, at, DialError::TimedOut),
            (true, false) => self.cut(now, at, FlowEnd::Idle),
            // Its service looks at the clock of what is listened for.
            (false, _) => self.mark_dirty(at),
        }
    }

    /// Cuts both sides of a flow for what it says, or does not say, of its name.
    pub(super) fn refuse_name(&mut self, now: Time, at: usize, refusal: &InspectRefusal) {
        let word = refusal.word();
        if let Some(place) = InspectRefusal::WORDS.iter().position(|known| *known == word) {
            self.name_refusals[place] += 1;
            self.want_report(now);
        }
        let Some(flow) = self.flows.get(at) else { return };
        let naming = flow
            .decision
            .as_ref()
            .and_then(|decision| decision.naming.as_ref());
        let told = NameRefusal {
            word,
            text: refusal.line(),
            spoken: refusal.spoken().cloned(),
            wanted: naming
                .map(|naming| naming.names.names.clone())
                .unwrap_or_default(),
        };
        self.reset_guest(now, at);
        self.end_flow_for(at, FlowEnd::NameRefused, Some(Box::new(told)));
    }
}

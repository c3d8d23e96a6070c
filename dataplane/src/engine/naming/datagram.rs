//! UDP associations whose verdict rests on a name: every datagram is shown to the inspector first.

use std::sync::Arc;

use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::inspect::{DatagramInspector, DatagramProgress, InspectRefusal, NameList};
use crate::engine::naming::check::Patience;
use crate::engine::reply::{self, Unreachable};
use crate::engine::{Engine, Event, Outcome, Time};

/// A UDP association that is followed.
pub struct Checked {
    inspector: DatagramInspector<Arc<NameList>>,
    clock: Patience,
    /// Datagrams that passed.
    passed: u64,
}

impl Checked {
    /// When the guest has taken too long over a name.
    pub(in crate::engine) fn deadline(&self) -> Option<Time> {
        self.clock.deadline()
    }

    fn show(&mut self, now: Time, datagram: &[u8]) -> DatagramProgress {
        let progress = self.inspector.handle(datagram);
        self.passed += u64::from(progress == DatagramProgress::Pass);
        self.clock.look(now, self.inspector.is_waiting(), self.passed);
        progress
    }
}

impl Engine {
    /// The state of a UDP association that is let through.
    pub(in crate::engine) fn association(&mut self, now: Time, at: usize) -> State {
        let demand = self.flows.get(at).and_then(|flow| flow.demand(&self.settings));
        match demand {
            None => State::Udp,
            Some(demand) => {
                let mut checked = Checked {
                    inspector: DatagramInspector::new(demand),
                    clock: Patience::default(),
                    passed: 0,
                };
                checked.clock.look(now, checked.inspector.is_waiting(), 0);
                State::Checked(Box::new(checked))
            }
        }
    }

    /// A datagram of an association that is followed.
    pub(in crate::engine) fn pass_checked<'a>(
        &mut self,
        now: Time,
        at: usize,
        payload: &'a [u8],
    ) -> Result<Outcome<'a>, DropReason> {
        let Some(State::Checked(checked)) = self.flows.get_mut(at).map(|flow| &mut flow.state) else {
            return Ok(Outcome::Done);
        };
        let progress = checked.show(now, payload);
        let mut released = checked.inspector.take_released();
        match progress {
            DatagramProgress::Pass if released.is_empty() => {
                return Ok(Outcome::Datagram { flow: at, payload });
            }
            DatagramProgress::Pass => released.push(payload.into()),
            DatagramProgress::Held => self.schedule(now, at),
            DatagramProgress::Drop if released.is_empty() => return Err(DropReason::Denied),
            DatagramProgress::Drop => self.count_drop(DropReason::Denied),
            DatagramProgress::Refuse(refusal) => {
                self.refuse_association(now, at, &refusal);
                return Err(DropReason::Denied);
            }
        }
        Ok(if released.is_empty() {
            Outcome::Done
        } else {
            Outcome::Datagrams {
                flow: at,
                payloads: released,
            }
        })
    }

    /// The same for those that waited for the verdict.
    pub(in crate::engine) fn pass_held(&mut self, now: Time, at: usize, packets: Vec<Box<[u8]>>) {
        let mut passed = Vec::new();
        for packet in packets {
            match self.pass_checked(now, at, &packet) {
                Ok(Outcome::Datagram { payload, .. }) => passed.push(payload.into()),
                Ok(Outcome::Datagrams { payloads, .. }) => passed.extend(payloads),
                Ok(_) => {}
                Err(reason) => self.count_drop(reason),
            }
        }
        if !passed.is_empty() && matches!(self.flows.get(at).map(|f| &f.state), Some(State::Checked(_))) {
            self.events.push_back(Event::Send {
                flow: at,
                packets: passed,
            });
        }
    }

    /// Ends an association whose name took too long. False while it has time.
    pub(in crate::engine) fn end_late_association(&mut self, now: Time, at: usize) -> bool {
        let Some(State::Checked(checked)) = self.flows.get_mut(at).map(|flow| &mut flow.state) else {
            return false;
        };
        if !checked.clock.is_over(now) {
            return false;
        }
        match checked.inspector.handle_late() {
            DatagramProgress::Refuse(refusal) => {
                self.refuse_association(now, at, &refusal);
                true
            }
            _ => {
                checked.clock = Patience::default();
                false
            }
        }
    }

    fn refuse_association(&mut self, now: Time, at: usize, refusal: &InspectRefusal) {
        if let Some(flow) = self.flows.get(at) {
            let (guest, peer) = (flow.key.guest, flow.key.peer);
            let gateway = self.gateway_towards(guest.ip());
            let why = Unreachable::Prohibited;
            reply::unreachable_for_udp(&mut self.transmit, gateway, guest, peer, why);
        }
        self.refuse_name(now, at, refusal);
    }
}

//! A flow's life, whatever its protocol: it opens, it counts, it has deadlines, it ends.

use std::time::Duration;

use vnet_proto::model::{FlowId, MissId, Reason};

use crate::descriptors::Descriptor;
use crate::engine::flow::{Flow, State};
use crate::engine::judge::Wanted;
use crate::engine::stack::Phase;
use crate::engine::tcp::{DialError, TCP_IDLE};
use crate::engine::timer::Timer;
use crate::engine::{ECHO_IDLE, Engine, Event, Time, datagram};
use crate::message::{FlowEnd, FlowOpened, MissEnd, NameRefusal, Report, flow_id};

/// How long a connection that both sides have closed may wait for the last acknowledgement.
const CLOSING_IDLE: Duration = Duration::from_secs(60);
/// How long a handshake towards the guest may go on. A live guest answers in microseconds; one that does not
/// is given as long as Linux repeats a SYN-ACK (63 s).
pub(super) const OPENING_PATIENCE: Duration = Duration::from_secs(60);
/// The least time ahead that a flow's timer is set.
const TIMER_STEP: Duration = Duration::from_millis(1);
/// The same of what is overdue while the guest has no link: it waits for that.
const AWAY_STEP: Duration = Duration::from_millis(100);
/// How much longer a guest without a link may go without repeating its SYN: the pauses between them double.
const AWAY_PATIENCE: Duration = Duration::from_secs(20);
/// When rings of a quiet connection give memory back.
const SHRINK_IDLE: Duration = Duration::from_secs(10);

impl Engine {
    /// A flow of this guest's; its place.
    pub(super) fn new_flow(&mut self, now: Time, wanted: Wanted, state: State) -> usize {
        let flow = Flow::new(self.next_flow_id(), now, wanted, state);
        self.insert(flow)
    }

    pub(super) fn next_flow_id(&mut self) -> FlowId {
        let id = flow_id(self.config.vm, self.next_flow);
        self.next_flow += 1;
        id
    }

    pub(super) fn insert(&mut self, flow: Flow) -> usize {
        let at = self.flows.insert(flow);
        self.enter_kind(at);
        at
    }

    /// A flow was let through: tell the session.
    pub(super) fn report_opened(&mut self, now: Time, at: usize, miss: Option<MissId>) {
        self.count_connection(at);
        let Some(flow) = self.flows.get(at) else { return };
        let (wanted, ingress) = (flow.wanted(), flow.ingress);
        let subject = self.subject(now, &wanted);
        let Some(flow) = self.flows.get(at) else { return };
        let decision = flow.decision.as_deref();
        let opened = FlowOpened {
            flow: flow.id,
            vm: self.config.vm,
            ingress,
            subject,
            epoch: decision.map(|d| d.epoch),
            grant: decision.map(|d| d.grant.clone()).unwrap_or_default(),
            reason: decision.map_or_else(
                || Reason::new("forward", "", "a port forward leads here"),
                |d| d.reason.clone(),
            ),
            would_deny: decision.is_some_and(|d| d.would_deny),
            opened_at: flow.opened_at,
            miss,
            names: decision
                .and_then(|d| d.naming.as_ref())
                .map(|naming| naming.names.names.clone())
                .unwrap_or_default(),
        };
        self.report(Report::FlowOpened(opened));
    }

    /// Ends a flow: out of the table, its host socket closed, the session told. What the guest still
    /// has to see must be queued before.
    pub(super) fn end_flow(&mut self, at: usize, end: FlowEnd) {
        self.end_flow_for(at, end, None);
    }

    /// The same, of a flow that may have been refused for its name.
    pub(super) fn end_flow_for(&mut self, at: usize, end: FlowEnd, refusal: Option<Box<NameRefusal>>) {
        let reset = !matches!(end, FlowEnd::Finished | FlowEnd::Idle);
        self.end_flow_with(at, end, reset, refusal);
    }

    /// The same; `reset` says whether the host's side sees a RST.
    fn end_flow_with(&mut self, at: usize, end: FlowEnd, reset: bool, refusal: Option<Box<NameRefusal>>) {
        let Some(mut flow) = self.flows.remove(at) else {
            return;
        };
        if let Some(kind) = flow.kind() {
            self.leave_kind(kind);
        }
        match &mut flow.state {
            State::Held(waiting) => {
                let miss = waiting.miss;
                if let Some(place) = self.synthetics.find(flow.key.peer.ip()) {
                    self.synthetics.leave(place, at);
                }
                let end = match end {
                    FlowEnd::GuestReset => MissEnd::GuestGaveUp,
                    FlowEnd::VmDown => MissEnd::VmDown,
                    FlowEnd::Evicted => MissEnd::Evicted,
                    _ => MissEnd::HoldExpired,
                };
                if self.held.leave(miss, at) {
                    self.report(Report::MissEnded { miss, end });
                }
                // It was let through, and waited for its name to be looked up and judged.
                if let Some(decision) = &flow.decision {
                    self.give_back(decision, flow.opened_by, end);
                }
                self.flows.release(at);
                return;
            }
            State::Service(_) => {
                self.flows.release(at);
                self.close_dns(flow.id.0);
                return;
            }
            State::Reading(reading) => self.leave_reading(at, reading, end),
            State::Switched(_)
            | State::Dialing { .. }
            | State::Tcp(_)
            | State::Udp
            | State::Checked(_)
            | State::Echo => {}
        }
        if let State::Switched(switched) = &flow.state {
            self.end_switched(&flow, switched, end);
            // It has no socket to close, but packets of it may wait among the events, by its place.
            self.events.push_back(Event::Close {
                flow: at,
                reset: false,
                descriptor: None,
            });
            return;
        }
        let descriptor = flow.descriptor.take();
        self.events.push_back(Event::Close {
            flow: at,
            reset,
            descriptor,
        });
        if flow.is_guest_api {
            self.guest_api.live -= 1;
            return;
        }
        self.report(Report::FlowClosed {
            flow: flow.id,
            end,
            bytes_up: flow.bytes_up,
            bytes_down: flow.bytes_down,
            refusal,
        });
    }

    /// A descriptor for the host's socket of one flow more, or of a query. `None` is counted: it is to be
    /// refused.
    pub(super) fn take_descriptor(&mut self) -> Option<Descriptor> {
        let taken = self.config.descriptors.take();
        if let Some((vm, count)) = taken.makes_way {
            self.events.push_back(Event::MakeWay { vm, count });
        }
        if taken.descriptor.is_none() {
            self.descriptors_refused += 1;
            self.note_status();
        }
        taken.descriptor
    }

    /// Other guests have less than their share of the host's descriptors, and this one more: ends so many
    /// flows that have one, the longest idle first.
    pub fn make_way(&mut self, now: Time, count: usize) {
        let mut having: Vec<(Time, usize)> = self
            .flows
            .places()
            .into_iter()
            .filter_map(|at| {
                let flow = self.flows.get(at)?;
                flow.descriptor.is_some().then_some((flow.last_active, at))
            })
            .collect();
        having.sort_unstable();
        for (_, at) in having.into_iter().take(count) {
            self.cut(now, at, FlowEnd::Evicted);
            self.made_way += 1;
        }
        self.config.descriptors.made_way();
        self.note_status();
    }

    /// Counts bytes that passed on a flow.
    pub fn count_bytes(&mut self, now: Time, at: usize, up: usize, down: usize) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        flow.last_active = now;
        flow.bytes_up += up as u64;
        flow.bytes_down += down as u64;
        let is_metered = flow.metered;
        if !flow.is_guest_api && !std::mem::replace(&mut flow.touched, true) {
            self.touched.push(at);
            self.want_report(now);
        }
        if is_metered {
            self.count_under_budget(now, at, up as u64, down as u64);
        }
    }

    pub(super) fn mark_dirty(&mut self, at: usize) {
        if let Some(flow) = self.flows.get_mut(at)
            && !std::mem::replace(&mut flow.dirty, true)
        {
            self.dirty.push(at);
        }
    }

    /// Flows that a frame or timer has given something to do, once each.
    pub fn take_dirty(&mut self, into: &mut Vec<usize>) {
        for at in self.dirty.drain(..) {
            if let Some(flow) = self.flows.get_mut(at) {
                flow.dirty = false;
                into.push(at);
            }
        }
    }

    /// Whether a flow waits to be serviced.
    pub fn has_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// When a flow wants attention next.
    pub(super) fn flow_deadline(&mut self, now: Time, at: usize) -> Option<Time> {
        let flow = self.flows.get_mut(at)?;
        let ends_at = flow.decision.as_ref().and_then(|d| d.expires_at);
        let own = match &mut flow.state {
            State::Held(waiting) => waiting
                .gives_up_at
                .map_or(waiting.deadline, |g| g.min(waiting.deadline)),
            State::Dialing { deadline, .. } => *deadline,
            State::Tcp(connection) | State::Service(connection) => {
                let quiet = if connection.phase() == Phase::Opening {
                    OPENING_PATIENCE
                } else if connection.is_closing() {
                    CLOSING_IDLE
                } else if now < flow.last_active + SHRINK_IDLE {
                    SHRINK_IDLE
                } else {
                    TCP_IDLE
                };
                let idle = flow.last_active + quiet;
                let named = connection.check.as_ref().and_then(|check| check.deadline());
                let own = connection.poll_timeout(now);
                own.into_iter().chain(named).fold(idle, Time::min)
            }
            State::Reading(reading) => {
                let named = reading.deadline();
                let own = reading.connection.poll_timeout(now);
                own.into_iter()
                    .chain(named)
                    .fold(flow.last_active + TCP_IDLE, Time::min)
            }
            State::Udp => flow.last_active + datagram::udp_idle(flow.bytes_down),
            State::Checked(checked) => {
                let idle = flow.last_active + datagram::udp_idle(flow.bytes_down);
                checked.deadline().map_or(idle, |named| named.min(idle))
            }
            State::Echo => flow.last_active + ECHO_IDLE,
            State::Switched(switched) => {
                switched.deadline(flow.key.protocol, flow.last_active, flow.bytes_down)?
            }
        };
        Some(ends_at.map_or(own, |ends| ends.min(own)))
    }

    /// Sets a flow's timer, if it must fire earlier than the one that is set.
    pub(super) fn schedule(&mut self, now: Time, at: usize) {
        let Some(deadline) = self.flow_deadline(now, at) else {
            return;
        };
        // What is overdue waits for room or for service, both of which come by themselves; a timer that is
        // due at once would fire for ever.
        let step = if self.transmit.is_closed() && deadline <= now {
            AWAY_STEP
        } else {
            TIMER_STEP
        };
        let deadline = deadline.max(now + step);
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        if flow.scheduled.is_none_or(|set| deadline < set || set <= now) {
            flow.scheduled = Some(deadline);
            self.timers.set(deadline, Timer::Flow(at));
            let flows = &self.flows;
            let is_set = |at, time| flows.get(at).is_some_and(|flow| flow.scheduled == Some(time));
            self.timers.prune(flows.len(), is_set);
        }
    }

    pub(super) fn handle_flow_timeout(&mut self, now: Time, at: usize) {
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        // A place is taken again by other flows, and deadlines move: only the timer that is set counts.
        if flow.scheduled.is_none_or(|set| set > now) {
            return;
        }
        flow.scheduled = None;
        if flow
            .decision
            .as_ref()
            .and_then(|d| d.expires_at)
            .is_some_and(|ends| ends <= now)
        {
            self.cut(now, at, FlowEnd::GrantEnded);
            return;
        }
        match &mut flow.state {
            State::Held(waiting) => {
                if waiting.gives_up_at.is_some_and(|g| g <= now) && waiting.deadline > now {
                    if self.transmit.is_closed() {
                        waiting.gives_up_at = Some(now + AWAY_PATIENCE);
                        self.schedule(now, at);
                        return;
                    }
                    self.end_flow(at, FlowEnd::GuestReset);
                } else if waiting.deadline <= now {
                    self.refuse_held(now, at, FlowEnd::Idle);
                }
            }
            State::Dialing { deadline, .. } => {
                if *deadline <= now {
                    self.handle_refused(now, at, DialError::TimedOut);
                }
            }
            State::Tcp(connection) | State::Service(connection) => {
                let quiet = now.saturating_sub(flow.last_active);
                if connection.phase() == Phase::Opening && quiet >= OPENING_PATIENCE {
                    // Nothing has passed, and nobody must wait for what will not come.
                    self.unopened += 1;
                    self.want_report(now);
                    self.reset_guest(now, at);
                    self.end_flow_with(at, FlowEnd::Idle, true, None);
                    return;
                }
                if quiet >= TCP_IDLE || (connection.is_closing() && quiet >= CLOSING_IDLE) {
                    self.reset_guest(now, at);
                    self.end_flow(at, FlowEnd::Idle);
                    return;
                }
                if quiet >= SHRINK_IDLE {
                    connection.shrink_if_idle();
                }
                // Its service sends what is due, and sets the next timer.
                self.mark_dirty(at);
                return;
            }
            State::Reading(_) => self.handle_reading_timeout(now, at),
            State::Udp | State::Checked(_) | State::Echo => {
                let idle = match flow.state {
                    State::Echo => ECHO_IDLE,
                    _ => datagram::udp_idle(flow.bytes_down),
                };
                let last_active = flow.last_active;
                if self.end_late_association(now, at) {
                    return;
                }
                if now.saturating_sub(last_active) >= idle {
                    self.end_flow(at, FlowEnd::Idle);
                    return;
                }
            }
            State::Switched(switched) => {
                let deadline = switched.deadline(flow.key.protocol, flow.last_active, flow.bytes_down);
                if deadline.is_some_and(|at| at <= now) {
                    let end = switched.end_by_time();
                    self.cut(now, at, end);
                    return;
                }
            }
        }
        self.schedule(now, at);
    }
}

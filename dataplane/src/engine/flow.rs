//! The flow table: every flow of one VM, found by its addresses, its id or its place.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ahash::HashMap;
use slab::Slab;
use vnet_proto::model::{FlowId, FlowKey, MissId, Protocol, VmId};

use crate::descriptors::Descriptor;
use crate::engine::Time;
use crate::engine::cache::Decision;
use crate::engine::judge::Wanted;
use crate::engine::naming::{Checked, Reading};
use crate::engine::stack::Connection;
use crate::engine::switch::flow::Switched;
use crate::engine::synthetic::table::Place;
use crate::message::ForwardId;

/// Flows of one VM at once, when nothing else is configured.
pub const FLOWS_MAX: usize = 32_768;

/// Room for so many flows is kept when it is not used.
const KEPT_MAX: usize = 4_096;

/// One flow.
pub struct Flow {
    /// Its id.
    pub id: FlowId,
    /// Its addresses as the guest sees them.
    pub key: FlowKey,
    /// Where the host's side goes.
    pub dialled: SocketAddr,
    /// The other guest that the far side belongs to.
    pub neighbour: Option<VmId>,
    /// Opened from the host's side.
    pub ingress: bool,
    /// The forward that it came through.
    pub forward: Option<ForwardId>,
    /// It leads to the gateway's own API, of which the session is told nothing.
    pub is_guest_api: bool,
    /// Where it is in its life.
    pub state: State,
    /// What let it through has a budget.
    pub metered: bool,
    /// What let it through; `None` while held, for ingress and for the gateway's own services.
    pub decision: Option<Arc<Decision>>,
    /// The miss that let it through, while it waits for what follows.
    pub opened_by: Option<MissId>,
    /// When something last passed.
    pub last_active: Time,
    /// When it opened, for people.
    pub opened_at: SystemTime,
    /// Of its host socket, if it has or will have one.
    pub descriptor: Option<Descriptor>,
    /// Bytes from the guest.
    pub bytes_up: u64,
    /// Bytes to the guest.
    pub bytes_down: u64,
    /// When the timer that is set for it fires.
    pub scheduled: Option<Time>,
    /// Whether it waits to be serviced.
    pub dirty: bool,
    /// Whether its counts changed since they were reported.
    pub touched: bool,
}

/// Where a flow is in its life. Each state carries only what it needs.
pub enum State {
    /// Nothing is decided; packets wait.
    Held(Waiting),
    /// Allowed: the host's side is being dialled, the guest's SYN still unanswered.
    Dialing {
        /// The SYN's packet.
        syn: Box<[u8]>,
        /// When to give up.
        deadline: Time,
    },
    /// Allowed if the guest speaks a name that may pass: its SYN is answered, the name is read, and nothing
    /// is dialled before.
    Reading(Box<Reading>),
    /// A TCP connection.
    Tcp(Box<Connection>),
    /// A TCP connection to the gateway's own DNS.
    Service(Box<Connection>),
    /// A UDP association.
    Udp,
    /// A UDP association whose verdict rests on a name.
    Checked(Box<Checked>),
    /// An ICMP echo session.
    Echo,
    /// Any of the three, with another guest.
    Switched(Box<Switched>),
}

impl State {
    /// The miss that it waits for, and until when.
    pub(super) fn held_mut(&mut self) -> Option<(&mut MissId, &mut Time)> {
        match self {
            Self::Held(waiting) => Some((&mut waiting.miss, &mut waiting.deadline)),
            Self::Reading(reading) => reading.asking(),
            _ => None,
        }
    }

    /// The guest's end of a TCP connection, once its SYN was answered.
    pub(super) fn connection_mut(&mut self) -> Option<&mut Connection> {
        match self {
            Self::Tcp(connection) | Self::Service(connection) => Some(connection),
            Self::Reading(reading) => Some(&mut reading.connection),
            _ => None,
        }
    }
}

impl Flow {
    /// A flow of which nothing has passed yet.
    pub(super) fn new(id: FlowId, now: Time, wanted: Wanted, state: State) -> Self {
        Self {
            id,
            key: wanted.key,
            dialled: wanted.dialled,
            neighbour: wanted.neighbour,
            ingress: false,
            forward: None,
            is_guest_api: false,
            state,
            metered: false,
            decision: None,
            opened_by: None,
            last_active: now,
            opened_at: SystemTime::now(),
            descriptor: None,
            bytes_up: 0,
            bytes_down: 0,
            scheduled: None,
            dirty: false,
            touched: false,
        }
    }

    /// Where it goes.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted {
            key: self.key,
            dialled: self.dialled,
            neighbour: self.neighbour,
        }
    }

    /// Which of the limits for UDP associations and echo sessions it counts for.
    pub fn kind(&self) -> Option<Protocol> {
        match &self.state {
            State::Udp | State::Checked(_) | State::Echo => Some(self.key.protocol),
            State::Switched(switched) if switched.is_opener() && self.key.protocol != Protocol::Tcp => {
                Some(self.key.protocol)
            }
            _ => None,
        }
    }
}

/// What a held flow keeps.
pub struct Waiting {
    /// The miss it waits for.
    pub miss: MissId,
    /// Its packets: for TCP the SYN as an IP packet, to the host without payload; for UDP payloads; for ICMP messages.
    pub packets: Vec<Box<[u8]>>,
    /// The first packet whole (headers and eight bytes), for an ICMP refusal.
    pub quote: Box<[u8]>,
    /// When it is refused unanswered.
    pub deadline: Time,
    /// When the guest has evidently stopped trying (TCP only).
    pub gives_up_at: Option<Time>,
}

/// Every flow of one VM.
pub struct FlowTable {
    /// `None` marks a place whose host socket is not closed yet: it must not be taken again before.
    flows: Slab<Option<Flow>>,
    live: usize,
    by_key: HashMap<FlowKey, usize>,
    by_id: HashMap<FlowId, usize>,
    /// How many go to each synthetic address.
    synthetic: HashMap<Place, usize>,
    /// Where the last packet went: bulk traffic comes in runs.
    last: Option<(FlowKey, usize)>,
    capacity: usize,
}

impl FlowTable {
    /// An empty table for at most `capacity` flows.
    pub fn new(capacity: usize) -> Self {
        Self {
            flows: Slab::new(),
            live: 0,
            by_key: HashMap::default(),
            by_id: HashMap::default(),
            synthetic: HashMap::default(),
            last: None,
            capacity,
        }
    }

    /// Whether another flow fits.
    pub fn has_room(&self) -> bool {
        self.live < self.capacity
    }

    /// Flows in the table.
    pub fn len(&self) -> usize {
        self.live
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// The place of a flow.
    pub fn find(&mut self, key: &FlowKey) -> Option<usize> {
        if let Some((last, at)) = self.last
            && last == *key
        {
            return Some(at);
        }
        let at = *self.by_key.get(key)?;
        self.last = Some((*key, at));
        Some(at)
    }

    /// Whether a flow with these addresses exists.
    pub fn contains(&self, key: &FlowKey) -> bool {
        self.by_key.contains_key(key)
    }

    /// Whether a flow goes to a synthetic address.
    pub fn has_synthetic(&self, place: Place) -> bool {
        self.synthetic.contains_key(&place)
    }

    /// The place of a flow by its id.
    pub fn find_id(&self, id: FlowId) -> Option<usize> {
        self.by_id.get(&id).copied()
    }

    /// Adds a flow; its place.
    pub fn insert(&mut self, flow: Flow) -> usize {
        let (key, id) = (flow.key, flow.id);
        let at = self.flows.insert(Some(flow));
        self.live += 1;
        self.by_key.insert(key, at);
        self.by_id.insert(id, at);
        if let Some(place) = Place::of(key.peer.ip()) {
            *self.synthetic.entry(place).or_default() += 1;
        }
        at
    }

    /// Takes a flow out. Its place stays taken until [`Self::release`].
    pub fn remove(&mut self, at: usize) -> Option<Flow> {
        let flow = self.flows.get_mut(at)?.take()?;
        self.live -= 1;
        self.by_key.remove(&flow.key);
        self.by_id.remove(&flow.id);
        if let Some(place) = Place::of(flow.key.peer.ip())
            && let Some(count) = self.synthetic.get_mut(&place)
        {
            *count -= 1;
            if *count == 0 {
                self.synthetic.remove(&place);
            }
        }
        self.last = None;
        if self.by_key.capacity() > KEPT_MAX && self.live < self.by_key.capacity() / 8 {
            self.by_key.shrink_to(self.live * 2);
            self.by_id.shrink_to(self.live * 2);
        }
        Some(flow)
    }

    /// The place of a flow that was taken out may be taken again.
    pub fn release(&mut self, at: usize) {
        if self.flows.get(at).is_some_and(Option::is_none) {
            self.flows.remove(at);
        }
        if self.flows.is_empty() && self.flows.capacity() > KEPT_MAX {
            self.flows = Slab::new();
        }
    }

    /// A flow by its place.
    pub fn get(&self, at: usize) -> Option<&Flow> {
        self.flows.get(at)?.as_ref()
    }

    /// A flow by its place.
    pub fn get_mut(&mut self, at: usize) -> Option<&mut Flow> {
        self.flows.get_mut(at)?.as_mut()
    }

    /// The places of all flows.
    pub fn places(&self) -> Vec<usize> {
        self.flows
            .iter()
            .filter(|(_, flow)| flow.is_some())
            .map(|(at, _)| at)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_flood_leaves_no_room_behind_that_nobody_uses() {
        let mut table = FlowTable::new(FLOWS_MAX);
        let places: Vec<usize> = (0..20_000u16)
            .map(|port| {
                let key = FlowKey {
                    protocol: Protocol::Udp,
                    guest: (Ipv4Addr::LOCALHOST, port).into(),
                    peer: (Ipv4Addr::LOCALHOST, 53).into(),
                };
                let id = FlowId(u64::from(port));
                table.insert(Flow::new(id, Time::ZERO, Wanted::plain(key), State::Udp))
            })
            .collect();
        for at in places {
            table.remove(at);
            table.release(at);
        }
        assert!(table.is_empty());
        let kept = [
            table.flows.capacity(),
            table.by_key.capacity(),
            table.by_id.capacity(),
        ];
        assert!(kept.iter().all(|room| *room <= KEPT_MAX), "{kept:?}");
    }
}

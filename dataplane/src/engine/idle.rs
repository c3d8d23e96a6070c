//! Which UDP association and which echo session has been idle longest: it makes way when there are as many as there
//! may be.
//!
//! Owns an order for each of the two kinds, in which every flow of the kind has an entry with the time at which it was
//! looked at last. What passes on a flow does not touch it, so that a packet costs nothing here: an entry that turns
//! out to be older than its flow's last packet is put back with that time. Each packet causes that once at most, so
//! that a guest that opens flows beyond a limit pays for its packets and not for how many flows it has.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use vnet_proto::model::{FlowId, Protocol};

use crate::engine::flow::{Flow, FlowTable};
use crate::engine::{ECHO_FLOWS_MAX, Engine, Time, UDP_FLOWS_MAX};
use crate::message::FlowEnd;

/// Flows of the kinds that have a limit of their own.
#[derive(Default)]
pub(super) struct Idle {
    pub(super) udp: Kind,
    pub(super) echo: Kind,
}

/// The flows of one kind.
#[derive(Default)]
pub(super) struct Kind {
    /// How many there are.
    live: usize,
    /// When each was last looked at, the longest ago first. May have some that are gone.
    order: BinaryHeap<Reverse<(Time, FlowId, usize)>>,
}

impl Kind {
    fn enter(&mut self, at: usize, flow: &Flow, flows: &FlowTable) {
        self.live += 1;
        self.order.push(Reverse((flow.last_active, flow.id, at)));
        if self.order.len() > 2 * self.live + SPARE {
            self.order
                .retain(|Reverse((_, id, at))| flows.get(*at).is_some_and(|flow| flow.id == *id));
        }
    }

    /// Takes out the one that has been idle longest.
    fn take_longest(&mut self, flows: &FlowTable) -> Option<usize> {
        loop {
            let Reverse((seen, id, at)) = self.order.pop()?;
            match flows.get(at).filter(|flow| flow.id == id) {
                Some(flow) if flow.last_active > seen => {
                    self.order.push(Reverse((flow.last_active, id, at)));
                }
                Some(_) => return Some(at),
                None => {}
            }
        }
    }
}

impl Engine {
    /// A flow is of a kind that has a limit of its own, from now on.
    pub(super) fn enter_kind(&mut self, at: usize) {
        if let Some(flow) = self.flows.get(at)
            && let Some(kind) = flow.kind()
        {
            match kind {
                Protocol::Udp => &mut self.idle.udp,
                _ => &mut self.idle.echo,
            }
            .enter(at, flow, &self.flows);
        }
    }

    /// A flow of such a kind is out of the table.
    pub(super) fn leave_kind(&mut self, kind: Protocol) {
        match kind {
            Protocol::Udp => self.idle.udp.live -= 1,
            _ => self.idle.echo.live -= 1,
        }
    }

    /// Ends the longest idle flow of a kind when there are as many as there may be. Echo of both families is one kind.
    pub(super) fn evict_beyond_limit(&mut self, protocol: Protocol) {
        let (kind, max) = match protocol {
            Protocol::Tcp => return,
            Protocol::Udp => (&mut self.idle.udp, UDP_FLOWS_MAX),
            Protocol::Icmp | Protocol::Icmpv6 => (&mut self.idle.echo, ECHO_FLOWS_MAX),
        };
        if kind.live >= max
            && let Some(idle) = kind.take_longest(&self.flows)
        {
            self.end_flow(idle, FlowEnd::Evicted);
        }
    }
}

/// Entries of flows that are gone are left in the order until there are more of them than this, and than of live ones.
const SPARE: usize = 256;

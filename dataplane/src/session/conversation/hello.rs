//! The beginning: Hello, which says everything that the controlplane may not know, and what follows it.

use std::time::Instant;

use prost::Message as _;
use vnet_proto::model::CLOSED_ADDRESSES;
use vnet_proto::v1;
use vnet_proto::v1::session_request::Message;

use super::{Conversation, Link, WELCOME_PATIENCE, request};
use crate::session::wire;

impl Conversation {
    /// Begins a stream. The answer is its first message; nothing else may be sent before a Welcome.
    pub(in crate::session) fn hello(&mut self, now: Instant) -> v1::SessionRequest {
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
            nat: self.nat(),
            host_addresses: Some(wire::host_addresses(&self.guards.host_addresses())),
            vms: self.mirror.vms().collect(),
            live_flows: Vec::new(),
            forwards: self.forwards(),
            zones: self.zones(),
            bindings: Vec::new(),
            uses: Vec::new(),
            capabilities: vec![CLOSED_ADDRESSES.to_owned()],
            software: concat!("vnet-dataplane ", env!("CARGO_PKG_VERSION")).to_owned(),
            closed_addresses: self
                .guards
                .own_listeners()
                .iter()
                .map(ToString::to_string)
                .collect(),
        };
        once_each(&mut hello.vms);
        // A gRPC message has a limit of size; what does not fit follows as if it happened just now.
        let mut room = HELLO_BYTES_MAX.saturating_sub(hello.encoded_len());
        // Uses first: what has opened is counted before it is told.
        let mut uses_left = Vec::new();
        for used in self.mirror.uses() {
            if fits(&mut room, used.encoded_len()) {
                hello.uses.push(used);
            } else {
                uses_left.push(used);
            }
        }
        if !uses_left.is_empty() {
            self.outbox.push_back(Message::FlowStats(v1::FlowStats {
                counts: Vec::new(),
                uses: uses_left,
            }));
        }
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

    fn nat(&self) -> Vec<v1::Nat> {
        let nat = self.identity.nat.iter();
        nat.map(|(address, dialled)| v1::Nat {
            address: address.to_string(),
            dialled: dialled.to_string(),
        })
        .collect()
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

/// Leaves the content of lists to the first VM that brings them: the others share its policy.
fn once_each(vms: &mut [v1::VmUp]) {
    let mut seen = std::collections::HashSet::new();
    for own in vms.iter_mut().filter_map(|vm| vm.own_policy.as_mut()) {
        for list in &mut own.lists {
            if !seen.insert((list.path.clone(), list.sha256.clone())) {
                list.content.clear();
            }
        }
    }
}

/// The version of the conversation that this is.
const PROTOCOL_VERSION: u32 = 1;
/// Bytes of a Hello, half of what gRPC takes by default, so that the estimate may be rough.
const HELLO_BYTES_MAX: usize = 2 << 20;
/// Bytes of a repeated field's tag and length, at most.
const FIELD_BYTES: usize = 8;

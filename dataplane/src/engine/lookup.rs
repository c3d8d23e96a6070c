//! The gateway's DNS, joined to the verdict cache, the held misses and the bindings.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;

use vnet_proto::model::{LookupSubject, Name, Reason, VerdictAction};

use crate::engine::cache::Decision;
use crate::engine::flow::State;
use crate::engine::frame::DropReason;
use crate::engine::gateway::dns::{self, Transport, Unasked};
use crate::engine::reply;
use crate::engine::timer::Timer;
use crate::engine::{Engine, Event, Time};
use crate::message::{MissEnd, Report};

const DNS_PORT: u16 = 53;

impl Engine {
    /// Whether a query to this address is answered by the gateway's own DNS, whoever it was for: the policy
    /// says so, and it is neither a guest's nor an address that nothing may be sent to.
    pub(super) fn is_redirected(&self, server: SocketAddr) -> bool {
        self.settings.dns.redirect
            && server.port() == DNS_PORT
            && matches!(self.check_destination(server.ip()), Ok(None))
    }

    /// `server` is the address that was asked, and that answers.
    pub(super) fn handle_dns_datagram(
        &mut self,
        now: Time,
        guest: SocketAddr,
        server: IpAddr,
        payload: &[u8],
    ) {
        let zones = self.surroundings.zones();
        if !self.is_gateway(server) {
            self.dns.count_redirected();
            let from = SocketAddr::new(server, DNS_PORT);
            self.dns
                .handle_query(now, &zones, guest, Transport::Redirected(from), payload);
            self.act_on_dns(now);
            return;
        }
        let client = match guest {
            // The zone stands for which of the gateway's two addresses it was.
            SocketAddr::V6(v6) => {
                let on_link = self.config.ipv6.as_ref().is_some_and(|i| server == i.link_local);
                SocketAddrV6::new(*v6.ip(), v6.port(), 0, u32::from(on_link)).into()
            }
            SocketAddr::V4(_) => guest,
        };
        self.dns
            .handle_query(now, &zones, client, Transport::Udp, payload);
        self.act_on_dns(now);
    }

    /// Moves what a guest sent on a connection to the gateway's DNS into it.
    pub(super) fn serve_dns(&mut self, now: Time, at: usize) {
        let zones = self.surroundings.zones();
        let Some(flow) = self.flows.get_mut(at) else {
            return;
        };
        let (id, client) = (flow.id.0, flow.key.guest);
        let State::Service(connection) = &mut flow.state else {
            return;
        };
        let mut refused = false;
        while connection.has_received() {
            let taken = connection.lend_received(|bytes| {
                let taken = self.dns.handle_stream(now, &zones, client, id, bytes);
                refused = taken.is_none();
                Ok::<_, std::convert::Infallible>(taken.unwrap_or(bytes.len()))
            });
            if taken == Ok(0) {
                break;
            }
            flow.last_active = now;
        }
        if refused {
            connection.abort();
        }
        self.act_on_dns(now);
        // A guest that has finished asking still waits for its answers.
        if self.dns.open_on(id) == 0
            && let Some(flow) = self.flows.get_mut(at)
            && let State::Service(connection) = &mut flow.state
            && connection.is_received_whole()
        {
            connection.close();
        }
    }

    /// Does what the gateway's DNS asks for, until it asks for nothing more.
    pub(super) fn act_on_dns(&mut self, now: Time) {
        // Whatever came of it was counted.
        self.want_report(now);
        while let Some(event) = self.dns.poll_event() {
            match event {
                dns::Event::Reply {
                    client,
                    transport,
                    bytes,
                } => self.send_answer(now, client, transport, &bytes),
                dns::Event::Ask { name, query_type } => self.ask_name(now, name, query_type),
                dns::Event::Unasked { name, why } => self.end_lookup(&name, why),
                dns::Event::Upstream { query, bytes } => {
                    match self.take_descriptor() {
                        Some(descriptor) => self.events.push_back(Event::Resolve {
                            query,
                            bytes,
                            descriptor,
                        }),
                        // As from an upstream that does not answer; the loop goes on with what that means.
                        None => self.dns.handle_upstream(query, None),
                    }
                }
                dns::Event::Abandoned { query } => self.abandon_aliases(query),
                dns::Event::Bind {
                    name,
                    addresses,
                    expires_in,
                } => {
                    for address in self.bindings.learn(now, &name, &addresses, expires_in) {
                        self.cache.forget_address(address);
                    }
                    self.schedule_bindings();
                    self.report(Report::Binding {
                        vm: self.config.vm,
                        name,
                        addresses,
                        expires_in,
                    });
                }
                dns::Event::Decided {
                    name,
                    query_type,
                    action,
                    count,
                } => {
                    self.report_lookup(now, LookupSubject::new(name, query_type), action, count);
                }
            }
        }
        self.schedule_dns(now);
    }

    /// Sets the timer for the first query, or answer, that has waited long enough.
    pub(super) fn schedule_dns(&mut self, now: Time) {
        let deadlines = self
            .dns
            .poll_timeout()
            .into_iter()
            .chain(self.aliases.next_deadline());
        if let Some(at) = deadlines.min() {
            // One entry per deadline is enough: early ones find nothing due.
            if self.dns_set.is_none_or(|set| at < set || set <= now) {
                self.dns_set = Some(at);
                self.timers.set(at, Timer::Dns);
            }
        }
    }

    fn send_answer(&mut self, now: Time, client: SocketAddr, transport: Transport, bytes: &[u8]) {
        match transport {
            Transport::Udp => {
                let server: IpAddr = match (client, &self.config.ipv6) {
                    (SocketAddr::V6(v6), Some(ipv6)) if v6.scope_id() != 0 => ipv6.link_local.into(),
                    (SocketAddr::V6(_), Some(ipv6)) => ipv6.gateway.into(),
                    _ => self.config.gateway.into(),
                };
                let from = SocketAddr::new(server, DNS_PORT);
                if !reply::udp(&mut self.transmit, from, client, bytes, self.config.mtu_bytes) {
                    self.count_drop(DropReason::TransmitQueueFull);
                }
            }
            Transport::Redirected(from) => {
                if !reply::udp(&mut self.transmit, from, client, bytes, self.config.mtu_bytes) {
                    self.count_drop(DropReason::TransmitQueueFull);
                }
            }
            Transport::Tcp(id) => {
                let Some(at) = self.flows.find_id(vnet_proto::model::FlowId(id)) else {
                    return;
                };
                let Some(flow) = self.flows.get_mut(at) else {
                    return;
                };
                let State::Service(connection) = &mut flow.state else {
                    return;
                };
                let mut rest = bytes;
                while !rest.is_empty() {
                    let sent = connection.lend_room(|room| {
                        let length = room.len().min(rest.len());
                        room[..length].copy_from_slice(&rest[..length]);
                        Ok::<_, std::convert::Infallible>(length)
                    });
                    match sent {
                        Ok(length) if length > 0 => rest = &rest[length..],
                        // A guest that asks and does not read is cut off rather than remembered.
                        _ => {
                            connection.abort();
                            break;
                        }
                    }
                }
                flow.last_active = now;
                self.mark_dirty(at);
            }
        }
    }

    /// Gets a verdict on a name: from the cache at once, or by a miss.
    fn ask_name(&mut self, now: Time, name: Name, query_type: u16) {
        if let Some(decision) = self.cache.lookup_name(now, &name).cloned() {
            self.act_on_name(now, &name, &decision, 0);
            return;
        }
        match self.held.join_lookup(&name, query_type) {
            Some((miss, true)) => self.ask_lookup(miss, LookupSubject::new(name, query_type)),
            Some((_, false)) => {}
            None => {
                self.count_drop(DropReason::HeldLimit);
                self.dns.handle_no_room(&name);
            }
        }
    }

    /// A verdict on a name that was asked about.
    pub(super) fn answer_name(&mut self, now: Time, name: &Name, decision: &Arc<Decision>) {
        // The controlplane counts a miss when it decides it.
        self.act_on_name(now, name, decision, 1);
        self.act_on_dns(now);
    }

    /// Its queries go upstream, get synthetic addresses, or are refused. Of them `counted` are counted already.
    fn act_on_name(&mut self, now: Time, name: &Name, decision: &Decision, counted: u64) {
        let synthesis = match decision.action {
            VerdictAction::Allow => self.synthesize(now, name, decision.synthetic_only),
            VerdictAction::Deny | VerdictAction::Drop => None,
        };
        match synthesis {
            Some(synthesis) => self.dns.handle_synthesis(now, name, synthesis, counted),
            None => self
                .dns
                .handle_name_verdict(now, name, decision.action, &decision.reason, counted),
        }
    }

    pub(super) fn extend_lookup(&mut self, now: Time, name: &Name, hold: std::time::Duration) {
        self.dns
            .handle_held(now, name, hold.min(self.settings.lookup_hold));
        self.act_on_dns(now);
    }

    fn end_lookup(&mut self, name: &Name, why: Unasked) {
        let Some(miss) = self.held.lookup_miss(name) else {
            return;
        };
        self.held.take(miss);
        let end = match why {
            Unasked::HoldEnded => MissEnd::HoldExpired,
            Unasked::GuestGaveUp => MissEnd::GuestGaveUp,
            Unasked::NoRoom => MissEnd::Evicted,
        };
        self.report(Report::MissEnded { miss, end });
    }

    fn report_lookup(&mut self, now: Time, lookup: LookupSubject, action: VerdictAction, count: u64) {
        let decision = self.cache.lookup_name(now, &lookup.name);
        let (reason, would_deny) = decision.map_or_else(
            || (Reason::new("verdict", "", "decided for this lookup alone"), false),
            |d| (d.reason.clone(), d.would_deny),
        );
        self.report(Report::Decided {
            vm: self.config.vm,
            subject: vnet_proto::model::Subject::Lookup(lookup),
            action,
            reason,
            count,
            would_deny,
        });
    }

    pub(super) fn handle_dns_timeout(&mut self, now: Time) {
        self.dns_set = None;
        self.dns.handle_timeout(now);
        self.expire_aliases(now);
        self.act_on_dns(now);
    }

    /// An upstream answered, or nobody did.
    pub fn handle_resolved(&mut self, now: Time, query: u64, answer: Option<Vec<u8>>) {
        self.clock = now;
        let Some(answer) = answer else {
            return self.act_on_resolved(now, query, None);
        };
        if let Some(answer) = self.judge_answer(now, query, answer) {
            self.act_on_resolved(now, query, Some(&answer));
        }
    }

    /// Acts on an answer whose aliases, if it has any, are allowed.
    pub(super) fn act_on_resolved(&mut self, now: Time, query: u64, answer: Option<&[u8]>) {
        if self.handle_found(now, query, answer) {
            return;
        }
        self.dns.handle_upstream(query, answer);
        self.act_on_dns(now);
    }

    /// A connection to the gateway's DNS is gone.
    pub(super) fn close_dns(&mut self, connection: u64) {
        self.dns.handle_closed(connection);
        self.act_on_dns(self.clock);
    }

    fn schedule_bindings(&mut self) {
        if let Some(at) = self.bindings.next_expiry()
            && self.bindings_set.is_none_or(|set| at < set)
        {
            self.bindings_set = Some(at);
            self.timers.set(at, Timer::Bindings);
        }
    }

    pub(super) fn handle_bindings_timeout(&mut self, now: Time) {
        if self.bindings_set.is_none_or(|set| set > now) {
            return;
        }
        self.bindings_set = None;
        for address in self.bindings.expire(now) {
            self.cache.forget_address(address);
        }
        self.schedule_bindings();
    }
}

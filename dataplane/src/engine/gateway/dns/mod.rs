//! The gateway's DNS server for one guest, sans I/O (RFC 1035, RFC 7766, RFC 9210).
//!
//! What happens to a query, top to bottom, is [`Dns::handle_query`]:
//!
//! 1. what is not one question of class IN is refused or ignored ([`message`])
//! 2. a name of a local zone is answered at once ([`zones`]), without a verdict
//! 3. any other name needs one: the query is held and [`Event::Ask`] emitted, once for all queries of the
//!    name that wait (retransmissions, the A and AAAA pair, other programs)
//! 4. allowed: the question goes upstream, and what comes back is relayed; the addresses in it are bound to
//!    the name ([`Event::Bind`]) before the guest learns them
//!    ([`limits`] bounds how many and how many different names go upstream)
//!    ([`crate::engine::aliases`] judges the names that an answer leads through first)
//! 5. denied: REFUSED (or what the policy says) with an extended error that says why; dropped: silence; not decided in time: SERVFAIL
//!    with an extended error that says that it awaits approval
//!
//! Owns the held queries, their limits and deadlines. Left to others: verdicts and their cache (the engine),
//! upstreams ([`crate::egress::resolver`]), what bindings mean ([`crate::engine::bindings`]).

pub mod limits;
pub mod message;
mod queries;
pub mod stream;
pub mod zones;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ahash::AHashMap;
use hickory_proto::op::ResponseCode;
use vnet_proto::model::{Name, Reason, VerdictAction};

use self::limits::{Limits, Reached};
use self::message::{ExtendedError, Question, Refusal, UDP_BYTES_PLAIN, Upstream, read_query};
use self::queries::{Queries, Query, State};
use self::stream::{Messages, framed};
use self::zones::Zones;
use crate::engine::Time;
use crate::message::{DnsDenial, DnsSettings};

/// Queries of one guest that wait for a verdict; the newest is refused.
pub const HELD_MAX: usize = 1_024;
/// Queries of one guest that wait for an upstream, or for verdicts on the aliases in its answer; the newest is
/// refused.
pub const UPSTREAM_MAX: usize = 512;
/// DNS connections of one guest.
pub const CONNECTIONS_MAX: usize = 64;
/// Queries that one connection has open; it is not read further until one is answered.
pub const QUERIES_PER_CONNECTION_MAX: usize = 32;
/// How long an upstream's answer is waited for, should the resolver never say that there is none.
pub const UPSTREAM_TIME: Duration = Duration::from_secs(15);
/// An answer teaches its addresses for the time that the guest is told, and for this long at least, unless its
/// policy says less: programs hold on to an address a little longer than they should.
pub const BINDING_TIME_MIN: Duration = Duration::from_secs(30);
/// What is added to that time, for the same reason.
pub const BINDING_GRACE: Duration = Duration::from_secs(30);

/// How a query came and its answer goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// In a datagram to another server's address, from which the answer has to come.
    Redirected(SocketAddr),
    /// Over the connection that the caller calls this.
    Tcp(u64),
}

/// What the caller has to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Send an answer. For TCP the bytes carry their length already, and the connection may be read on.
    Reply {
        /// Where to.
        client: SocketAddr,
        /// How.
        transport: Transport,
        /// The message.
        bytes: Vec<u8>,
    },
    /// Get a verdict on a name and hand it to [`Dns::handle_name_verdict`], at once or later.
    Ask {
        /// The name.
        name: Name,
        /// The type that was asked for first.
        query_type: u16,
    },
    /// No query waits for a verdict on this name any more, and none was given.
    Unasked {
        /// The name.
        name: Name,
        /// Why.
        why: Unasked,
    },
    /// Send a query upstream and hand the answer to [`Dns::handle_upstream`].
    Upstream {
        /// For the answer.
        query: u64,
        /// The message; its id is zero.
        bytes: Vec<u8>,
    },
    /// A query that waited for verdicts on aliases ([`Dns::await_aliases`]) is gone.
    Abandoned {
        /// Which.
        query: u64,
    },
    /// A lookup taught addresses. Always before the [`Event::Reply`] that tells them to the guest.
    Bind {
        /// The name that was asked for.
        name: Name,
        /// What it stands for.
        addresses: Vec<IpAddr>,
        /// For how long.
        expires_in: Duration,
    },
    /// Queries were decided by a verdict.
    Decided {
        /// The name.
        name: Name,
        /// The type of one of them.
        query_type: u16,
        /// What was done.
        action: VerdictAction,
        /// How many queries.
        count: u64,
    },
}

/// What a name's queries are answered with in place of the upstream's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synthesis {
    /// Synthetic addresses.
    Addresses {
        /// For queries of type A.
        v4: Ipv4Addr,
        /// For queries of type AAAA; `None`: there is none.
        v6: Option<Ipv6Addr>,
        /// Nothing goes upstream, of whatever type.
        only: bool,
    },
    /// None is left.
    Exhausted,
}

/// Why no verdict on a name is waited for any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unasked {
    /// The hold ended; the guest was told that it awaits approval.
    HoldEnded,
    /// The guest closed the connections that the queries came over.
    GuestGaveUp,
    /// A limit was reached.
    NoRoom,
}

/// What happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DnsCounts {
    /// Messages that were no query at all.
    pub ignored: u64,
    /// Queries refused for their form, operation or class.
    pub malformed: u64,
    /// Answered from local zones.
    pub local: u64,
    /// Queries that repeated one still open.
    pub repeated: u64,
    /// Refused because [`HELD_MAX`] queries wait for a verdict, or the caller has no room to ask.
    pub held_full: u64,
    /// Refused because [`UPSTREAM_MAX`] queries wait for an upstream.
    pub upstream_full: u64,
    /// Connections refused because there are [`CONNECTIONS_MAX`].
    pub connections_full: u64,
    /// Queries whose hold ended.
    pub hold_ended: u64,
    /// Upstream answers that were none to the question, or never came.
    pub upstream_failed: u64,
    /// Answers relayed.
    pub relayed: u64,
    /// Refused at a limit of the policy's.
    pub limited: u64,
    /// Queries to other servers that are answered here, and connections.
    pub redirected: u64,
    /// Queries answered with synthetic addresses, or with no data beside them.
    pub synthetic: u64,
}

/// The DNS server of one guest.
#[derive(Debug)]
pub struct Dns {
    hold: Duration,
    treatment: DnsSettings,
    limits: Limits,
    queries: Queries,
    connections: AHashMap<u64, Messages>,
    events: VecDeque<Event>,
    counts: DnsCounts,
}

impl Dns {
    /// A server that holds an undecided query for so long. `seed` keys what it counts names by.
    pub fn new(hold: Duration, seed: [u8; 32]) -> Self {
        Self {
            hold,
            treatment: DnsSettings::default(),
            limits: Limits::new(seed),
            queries: Queries::default(),
            connections: AHashMap::new(),
            events: VecDeque::new(),
            counts: DnsCounts::default(),
        }
    }

    /// Changes how long queries that come from now on are held.
    pub fn set_hold(&mut self, hold: Duration) {
        self.hold = hold;
    }

    /// Changes how queries are answered and limited from now on.
    pub fn set_treatment(&mut self, treatment: &DnsSettings) {
        self.treatment.clone_from(treatment);
        self.limits.set(treatment);
    }

    /// The limits that refused queries since the last call.
    pub fn take_reached(&mut self) -> Vec<Reached> {
        self.limits.take_reached()
    }

    /// Counts a query or connection to another server that is answered here.
    pub fn count_redirected(&mut self) {
        self.counts.redirected += 1;
    }

    /// Handles one message from the guest.
    pub fn handle_query(
        &mut self,
        now: Time,
        zones: &Zones,
        client: SocketAddr,
        transport: Transport,
        bytes: &[u8],
    ) {
        let question = match read_query(bytes) {
            Ok(question) => question,
            Err(Refusal::Ignored) => {
                self.counts.ignored += 1;
                return;
            }
            Err(Refusal::Answered(bytes)) => {
                self.counts.malformed += 1;
                self.reply(client, transport, bytes);
                return;
            }
        };
        if let Some(bytes) = zones.answer(&question) {
            self.counts.local += 1;
            let bytes = fitted(&question, transport, bytes);
            self.reply(client, transport, bytes);
            return;
        }
        if self.queries.is_open(client, transport, &question) {
            self.counts.repeated += 1;
            return;
        }
        let Some(name) = question.name.clone() else {
            // No verdict is about the root, so nothing can allow it.
            let why = ExtendedError::new(
                ExtendedError::PROHIBITED,
                "the root of the DNS is not looked up here",
            );
            self.reply(
                client,
                transport,
                question.error(ResponseCode::Refused, Some(&why)),
            );
            return;
        };
        let query_type = question.query_type;
        let deadline = now.saturating_add(self.hold);
        let query = Query {
            client,
            transport,
            question,
            name: name.clone(),
            state: State::Held,
            deadline,
        };
        if self.queries.insert(query) {
            self.events.push_back(Event::Ask { name, query_type });
        }
    }

    /// Takes bytes of a connection's stream. How many were taken: the rest has to wait until the next
    /// [`Event::Reply`] on this connection. `None`: too many connections, close this one.
    pub fn handle_stream(
        &mut self,
        now: Time,
        zones: &Zones,
        client: SocketAddr,
        connection: u64,
        bytes: &[u8],
    ) -> Option<usize> {
        if !self.connections.contains_key(&connection) {
            if self.connections.len() >= CONNECTIONS_MAX {
                self.counts.connections_full += 1;
                return None;
            }
            self.connections.insert(connection, Messages::default());
        }
        let transport = Transport::Tcp(connection);
        let mut taken = 0;
        while taken < bytes.len() && self.queries.of_connection(connection) < QUERIES_PER_CONNECTION_MAX {
            let messages = self.connections.get_mut(&connection)?;
            let (more, message) = messages.feed(&bytes[taken..]);
            taken += more;
            if let Some(message) = message {
                self.handle_query(now, zones, client, transport, &message);
            }
        }
        Some(taken)
    }

    /// A connection is gone, and with it everything that came over it.
    pub fn handle_closed(&mut self, connection: u64) {
        self.connections.remove(&connection);
        for key in self.queries.keys_of_connection(connection) {
            self.give_up(key, Unasked::GuestGaveUp);
        }
    }

    /// A verdict on a name: all its held queries go on, or are refused. `counted` of them were counted by whoever made
    /// the verdict.
    pub fn handle_name_verdict(
        &mut self,
        now: Time,
        name: &Name,
        action: VerdictAction,
        reason: &Reason,
        counted: u64,
    ) {
        let keys = self.queries.take_held(name);
        let Some(query_type) = keys
            .first()
            .and_then(|key| self.queries.get(*key))
            .map(|q| q.question.query_type)
        else {
            return;
        };
        let count = u64::try_from(keys.len()).unwrap_or(u64::MAX);
        if let count @ 1.. = count.saturating_sub(counted) {
            self.events.push_back(Event::Decided {
                name: name.clone(),
                query_type,
                action,
                count,
            });
        }
        for key in keys {
            match action {
                VerdictAction::Allow => self.ask_upstream(now, key),
                VerdictAction::Deny => self.deny(key, reason),
                VerdictAction::Drop => drop(self.queries.remove(key)),
            }
        }
    }

    fn deny(&mut self, key: u64, reason: &Reason) {
        // A person's no is the client's own filter, anything else the operator's.
        let by_person = reason.step == "grant";
        let code = if by_person {
            ExtendedError::FILTERED
        } else {
            ExtendedError::BLOCKED
        };
        let text = match self.treatment.deny_text.as_str() {
            "" => &*reason.text,
            text => text,
        };
        let why = ExtendedError::new(code, text);
        let code = match self.treatment.deny_with {
            DnsDenial::Refused => ResponseCode::Refused,
            DnsDenial::NxDomain => ResponseCode::NXDomain,
            DnsDenial::ServFail => ResponseCode::ServFail,
        };
        self.finish_with(key, code, &why);
    }

    /// What a query that went upstream asks for, if it still waits.
    pub fn asked_upstream(&self, query: u64) -> Option<(Name, u16)> {
        let query = self.queries.get(self.queries.key_of_upstream(query)?)?;
        Some((query.name.clone(), query.question.query_type))
    }

    /// A query was answered, and waits on for verdicts on the aliases in the answer: until then at most.
    pub fn await_aliases(&mut self, query: u64, deadline: Time) {
        self.queries.await_aliases(query, deadline);
    }

    /// A query that went upstream is refused, as one whose name is.
    pub fn handle_refused(&mut self, query: u64, action: VerdictAction, reason: &Reason) {
        let Some(key) = self.queries.key_of_upstream(query) else {
            return;
        };
        match action {
            VerdictAction::Drop => drop(self.queries.remove(key)),
            VerdictAction::Allow | VerdictAction::Deny => self.deny(key, reason),
        }
    }

    /// The aliases in the answer to a query were not decided in time.
    pub fn handle_undecided_aliases(&mut self, query: u64) {
        let Some(key) = self.queries.key_of_upstream(query) else {
            return;
        };
        let Some(asked) = self.queries.get(key) else {
            return;
        };
        self.counts.hold_ended += 1;
        let text = format!(
            "the aliases in the answer to {} were not decided in time; ask again",
            asked.name
        );
        let why = ExtendedError::new(ExtendedError::OTHER, text);
        self.finish_with(key, ResponseCode::ServFail, &why);
    }

    /// A name is allowed, and gets synthetic addresses. What would tell real ones beside them (HTTPS and SVCB
    /// records, RFC 9460) is answered with no data.
    /// `counted`: as [`Self::handle_name_verdict`] has it.
    pub fn handle_synthesis(&mut self, now: Time, name: &Name, synthesis: Synthesis, counted: u64) {
        let keys = self.queries.take_held(name);
        let mut decided = (0, 0u64);
        for key in keys {
            let Some(query_type) = self.queries.get(key).map(|q| q.question.query_type) else {
                continue;
            };
            let (address, only) = match synthesis {
                Synthesis::Exhausted => {
                    let why = ExtendedError::new(
                        ExtendedError::OTHER,
                        "every synthetic address is in use; ask again in a minute or two",
                    );
                    self.finish_with(key, ResponseCode::ServFail, &why);
                    continue;
                }
                Synthesis::Addresses { v4, v6, only } => match query_type {
                    TYPE_A => (Some(IpAddr::from(v4)), only),
                    TYPE_AAAA => (v6.map(IpAddr::from), only),
                    _ => (None, only),
                },
            };
            decided = (query_type, decided.1 + 1);
            let is_local =
                only || matches!(query_type, TYPE_A | TYPE_AAAA | TYPE_SVCB | TYPE_HTTPS | TYPE_ANY);
            if is_local {
                self.counts.synthetic += 1;
                let Some(query) = self.queries.remove(key) else {
                    continue;
                };
                let bytes = query.question.synthetic_answer(address);
                let bytes = fitted(&query.question, query.transport, bytes);
                self.reply(query.client, query.transport, bytes);
            } else {
                self.ask_upstream(now, key);
            }
        }
        let (query_type, count) = decided;
        if let count @ 1.. = count.saturating_sub(counted) {
            self.events.push_back(Event::Decided {
                name: name.clone(),
                query_type,
                action: VerdictAction::Allow,
                count,
            });
        }
    }

    /// A name waits for a person: its queries may be held so long from now.
    pub fn handle_held(&mut self, now: Time, name: &Name, hold: Duration) {
        self.queries.extend_held(name, now.saturating_add(hold));
    }

    /// The caller could not ask for a verdict on a name: too many questions are open.
    pub fn handle_no_room(&mut self, name: &Name) {
        for key in self.queries.take_held(name) {
            self.refuse_held(key);
        }
    }

    /// An upstream's answer to a query, or `None` when there is none.
    pub fn handle_upstream(&mut self, query: u64, answer: Option<&[u8]>) {
        let Some(key) = self.queries.key_of_upstream(query) else {
            return;
        };
        let Some(query) = self.queries.remove(key) else {
            return;
        };
        let (question, transport) = (&query.question, query.transport);
        let upstream = answer.and_then(Upstream::read);
        let room = match transport {
            Transport::Udp | Transport::Redirected(_) => {
                Some(question.edns.map_or(UDP_BYTES_PLAIN, |e| e.udp_bytes))
            }
            Transport::Tcp(_) => None,
        };
        let relayed = upstream
            .as_ref()
            .and_then(|upstream| question.relay(upstream, room));
        let (Some(upstream), Some(mut relayed)) = (upstream, relayed) else {
            self.counts.upstream_failed += 1;
            let why = ExtendedError::new(ExtendedError::NETWORK_ERROR, "no upstream DNS server answered");
            let bytes = question.error(ResponseCode::ServFail, Some(&why));
            self.reply(query.client, transport, bytes);
            return;
        };
        let (ttl_min, ttl_max) = (self.treatment.ttl_min, self.treatment.ttl_max);
        if !relayed.truncated {
            upstream.clamp_ttls(&mut relayed.bytes, ttl_min, ttl_max);
        }
        if matches!(question.query_type, TYPE_A | TYPE_AAAA) && !relayed.truncated {
            let (addresses, ttl) = upstream.addresses_of(&query.name);
            if !addresses.is_empty() {
                // Never shorter than what the guest is told.
                let least = BINDING_TIME_MIN.max(ttl_min).min(ttl_max);
                let expires_in = ttl.clamp(least, ttl_max) + BINDING_GRACE;
                self.events.push_back(Event::Bind {
                    name: query.name.clone(),
                    addresses,
                    expires_in,
                });
            }
        }
        self.counts.relayed += 1;
        self.reply(query.client, transport, relayed.bytes);
    }

    /// Ends what has waited too long. Harmless at any time.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(key) = self.queries.overdue(now) {
            let Some(query) = self.queries.get(key) else { break };
            if query.state == State::Held {
                self.counts.hold_ended += 1;
                let text = format!("{} awaits approval; ask again once it is approved", query.name);
                let name = query.name.clone();
                self.finish_with(
                    key,
                    ResponseCode::ServFail,
                    &ExtendedError::new(ExtendedError::OTHER, text),
                );
                self.note_unasked(name, Unasked::HoldEnded);
            } else if query.state == State::Aliases {
                self.handle_undecided_aliases(key);
            } else {
                self.counts.upstream_failed += 1;
                let why = ExtendedError::new(
                    ExtendedError::NETWORK_ERROR,
                    "no upstream DNS server answered in time",
                );
                self.finish_with(key, ResponseCode::ServFail, &why);
            }
        }
    }

    /// When [`Self::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.queries.next_deadline()
    }

    /// What to do next. Call it until there is nothing, after each other call. Limits on held queries
    /// are enforced when all has been done, so that a name whose verdict is at hand always finds room.
    pub fn poll_event(&mut self) -> Option<Event> {
        while self.events.is_empty() && self.queries.held() > HELD_MAX {
            let key = self.queries.newest_held()?;
            let name = self.queries.get(key)?.name.clone();
            self.refuse_held(key);
            self.note_unasked(name, Unasked::NoRoom);
        }
        self.events.pop_front()
    }

    /// Queries that came over a connection and are not answered yet.
    pub fn open_on(&self, connection: u64) -> usize {
        self.queries.of_connection(connection)
    }

    /// What happened so far.
    pub fn counts(&self) -> DnsCounts {
        self.counts
    }

    /// Queries held for a verdict on a name now.
    pub fn held_for(&self, name: &Name) -> usize {
        self.queries.held_for(name)
    }

    /// Whether a lookup of the engine's own may go upstream; it counts.
    pub fn admits(&mut self, now: Time, name: &Name, query_type: u16) -> bool {
        let admitted = self.limits.admit(now, name, query_type).is_ok();
        self.counts.limited += u64::from(!admitted);
        admitted
    }

    fn ask_upstream(&mut self, now: Time, key: u64) {
        if self.queries.upstream() >= UPSTREAM_MAX {
            self.counts.upstream_full += 1;
            let why = ExtendedError::new(ExtendedError::OTHER, "too many lookups are under way; try again");
            self.finish_with(key, ResponseCode::ServFail, &why);
            return;
        }
        let Some(asked) = self.queries.get(key) else {
            return;
        };
        let bytes = asked.question.upstream_query();
        if let Err(text) = self.limits.admit(now, &asked.name, asked.question.query_type) {
            self.counts.limited += 1;
            let why = ExtendedError::new(ExtendedError::PROHIBITED, text);
            self.finish_with(key, ResponseCode::Refused, &why);
            return;
        }
        let query = self.queries.send_upstream(key, now.saturating_add(UPSTREAM_TIME));
        self.events.push_back(Event::Upstream { query, bytes });
    }

    fn refuse_held(&mut self, key: u64) {
        self.counts.held_full += 1;
        let why = ExtendedError::new(
            ExtendedError::OTHER,
            "too many lookups await approval; answer some first",
        );
        self.finish_with(key, ResponseCode::ServFail, &why);
    }

    fn finish_with(&mut self, key: u64, code: ResponseCode, why: &ExtendedError) {
        let Some(query) = self.queries.remove(key) else {
            return;
        };
        let bytes = fitted(
            &query.question,
            query.transport,
            query.question.error(code, Some(why)),
        );
        self.reply(query.client, query.transport, bytes);
    }

    fn give_up(&mut self, key: u64, why: Unasked) {
        let Some(query) = self.queries.remove(key) else {
            return;
        };
        match query.state {
            State::Held => self.note_unasked(query.name, why),
            State::Aliases => self.events.push_back(Event::Abandoned { query: key }),
            State::Upstream => {}
        }
    }

    fn note_unasked(&mut self, name: Name, why: Unasked) {
        if self.queries.held_for(&name) == 0 {
            self.events.push_back(Event::Unasked { name, why });
        }
    }

    fn reply(&mut self, client: SocketAddr, transport: Transport, bytes: Vec<u8>) {
        let bytes = match transport {
            Transport::Udp | Transport::Redirected(_) => Some(bytes),
            Transport::Tcp(_) => framed(&bytes),
        };
        if let Some(bytes) = bytes {
            self.events.push_back(Event::Reply {
                client,
                transport,
                bytes,
            });
        }
    }
}

/// An answer of the gateway's own, as one that says only that it was cut when it is too long for the client.
fn fitted(question: &Question, transport: Transport, bytes: Vec<u8>) -> Vec<u8> {
    let room = question.edns.map_or(UDP_BYTES_PLAIN, |e| e.udp_bytes);
    if matches!(transport, Transport::Tcp(_)) || bytes.len() <= room {
        return bytes;
    }
    match Upstream::read(&bytes).and_then(|own| question.relay(&own, Some(room))) {
        Some(cut) => cut.bytes,
        None => question.error(ResponseCode::ServFail, None),
    }
}

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_SVCB: u16 = 64;
const TYPE_HTTPS: u16 = 65;
const TYPE_ANY: u16 = 255;

#[cfg(test)]
mod tests;

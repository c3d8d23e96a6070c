//! The open queries of one guest: held for a verdict, or waiting for an upstream.
//!
//! A table and its indexes, nothing more: by name for verdicts, by client for retransmissions, by
//! deadline, by connection. What is done with a query is [`super::Dns`]'s.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ahash::AHashMap;
use vnet_proto::model::Name;

use super::Transport;
use super::message::Question;
use crate::engine::Time;

/// One open query.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) client: SocketAddr,
    pub(super) transport: Transport,
    pub(super) question: Question,
    pub(super) name: Name,
    pub(super) state: State,
    pub(super) deadline: Time,
}

/// What a query waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// A verdict on its name.
    Held,
    /// The answer of an upstream.
    Upstream,
    /// Verdicts on the aliases in that answer.
    Aliases,
}

/// What makes a message a repetition: who asked, how, with which id, for what.
type Identity = (SocketAddr, Transport, u16, Vec<u8>);

/// Open queries by a key that grows.
#[derive(Debug, Default)]
pub(super) struct Queries {
    next: u64,
    by_key: AHashMap<u64, Query>,
    by_identity: AHashMap<Identity, u64>,
    held_by_name: AHashMap<Name, BTreeSet<u64>>,
    held: BTreeSet<u64>,
    by_deadline: BTreeSet<(Time, u64)>,
    by_connection: AHashMap<u64, BTreeSet<u64>>,
    upstream: usize,
}

impl Queries {
    /// Adds a held query. Whether it is the first of its name.
    pub(super) fn insert(&mut self, query: Query) -> bool {
        let key = self.next;
        self.next += 1;
        self.by_identity
            .insert(identity(query.client, query.transport, &query.question), key);
        self.by_deadline.insert((query.deadline, key));
        if let Transport::Tcp(connection) = query.transport {
            self.by_connection.entry(connection).or_default().insert(key);
        }
        self.held.insert(key);
        let of_name = self.held_by_name.entry(query.name.clone()).or_default();
        let first = of_name.is_empty();
        of_name.insert(key);
        self.by_key.insert(key, query);
        first
    }

    pub(super) fn get(&self, key: u64) -> Option<&Query> {
        self.by_key.get(&key)
    }

    /// Takes a query out, whatever it waits for.
    pub(super) fn remove(&mut self, key: u64) -> Option<Query> {
        let query = self.by_key.remove(&key)?;
        self.by_identity
            .remove(&identity(query.client, query.transport, &query.question));
        self.by_deadline.remove(&(query.deadline, key));
        if let Transport::Tcp(connection) = query.transport
            && let Some(keys) = self.by_connection.get_mut(&connection)
        {
            keys.remove(&key);
            if keys.is_empty() {
                self.by_connection.remove(&connection);
            }
        }
        match query.state {
            State::Held => self.unhold(key, &query.name),
            State::Upstream | State::Aliases => self.upstream -= 1,
        }
        Some(query)
    }

    /// Whether the same client already waits for the same answer.
    pub(super) fn is_open(&self, client: SocketAddr, transport: Transport, question: &Question) -> bool {
        self.by_identity
            .contains_key(&identity(client, transport, question))
    }

    /// The queries that are held for a name, oldest first. They are in the table still, but no longer
    /// held: the caller sends each upstream or removes it.
    pub(super) fn take_held(&mut self, name: &Name) -> Vec<u64> {
        let keys = self.held_by_name.remove(name).unwrap_or_default();
        for key in &keys {
            self.held.remove(key);
        }
        keys.into_iter().collect()
    }

    /// A query goes upstream, until `deadline`. The number it goes under.
    pub(super) fn send_upstream(&mut self, key: u64, deadline: Time) -> u64 {
        self.set_deadline(key, deadline);
        if let Some(query) = self.by_key.get_mut(&key) {
            query.state = State::Upstream;
            self.upstream += 1;
        }
        key
    }

    /// A query that an upstream answered waits on, until `deadline`. It counts as one that is upstream.
    pub(super) fn await_aliases(&mut self, key: u64, deadline: Time) {
        if self.key_of_upstream(key).is_none() {
            return;
        }
        self.set_deadline(key, deadline);
        if let Some(query) = self.by_key.get_mut(&key) {
            query.state = State::Aliases;
        }
    }

    /// The query that went upstream under this number, if it still waits.
    pub(super) fn key_of_upstream(&self, query: u64) -> Option<u64> {
        self.by_key
            .get(&query)
            .filter(|q| q.state != State::Held)
            .map(|_| query)
    }

    /// Draws out the deadline of every query held for a name.
    pub(super) fn extend_held(&mut self, name: &Name, deadline: Time) {
        let keys: Vec<u64> = self
            .held_by_name
            .get(name)
            .into_iter()
            .flatten()
            .copied()
            .collect();
        for key in keys {
            self.set_deadline(key, deadline);
        }
    }

    /// A query whose time is over.
    pub(super) fn overdue(&self, now: Time) -> Option<u64> {
        self.by_deadline
            .first()
            .filter(|(deadline, _)| *deadline <= now)
            .map(|(_, key)| *key)
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.by_deadline.first().map(|(deadline, _)| *deadline)
    }

    /// Queries held.
    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Queries held for a name.
    pub(super) fn held_for(&self, name: &Name) -> usize {
        self.held_by_name.get(name).map_or(0, BTreeSet::len)
    }

    pub(super) fn newest_held(&self) -> Option<u64> {
        self.held.last().copied()
    }

    /// Queries that wait for an upstream, or for verdicts on the aliases in its answer.
    pub(super) fn upstream(&self) -> usize {
        self.upstream
    }

    /// Open queries of a connection.
    pub(super) fn of_connection(&self, connection: u64) -> usize {
        self.by_connection.get(&connection).map_or(0, BTreeSet::len)
    }

    pub(super) fn keys_of_connection(&self, connection: u64) -> Vec<u64> {
        self.by_connection
            .get(&connection)
            .into_iter()
            .flatten()
            .copied()
            .collect()
    }

    fn set_deadline(&mut self, key: u64, deadline: Time) {
        if let Some(query) = self.by_key.get_mut(&key) {
            self.by_deadline.remove(&(query.deadline, key));
            query.deadline = deadline;
            self.by_deadline.insert((deadline, key));
        }
    }

    fn unhold(&mut self, key: u64, name: &Name) {
        self.held.remove(&key);
        if let Some(keys) = self.held_by_name.get_mut(name) {
            keys.remove(&key);
            if keys.is_empty() {
                self.held_by_name.remove(name);
            }
        }
    }
}

fn identity(client: SocketAddr, transport: Transport, question: &Question) -> Identity {
    (client, transport, question.id, question.wire.clone())
}

//! Who exposed what, in the words in which it was asked for. The dataplane knows where forwards listen; that
//! `:6443` is what two of its forwards were asked for as, and which guest asked, is known here alone, and for as long
//! as this process lives, which is how long its dataplane does.
//!
//! A place is taken before anything is done for it, so that of two who ask for it at once one is refused. Nothing is
//! waited for while the table is held.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vnet_proto::model::ForwardListen;
use vnet_proto::v1;

use super::forwarder::Kind;

/// Exposed places of one network; the dataplane's own limit of forwards is below it.
pub(super) const EXPOSED_MAX: usize = 4096;
/// Places that one guest has exposed.
pub const GUEST_FORWARDS_MAX: usize = 128;

/// What a place is told from others by: text, as in the peer, so that `:80` and `0.0.0.0:80` are two.
type Key = (String, Kind);

/// The table. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Exposed(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    /// Entries, by place; sorted as they are listed.
    entries: BTreeMap<Key, Entry>,
    /// Entries so far.
    last: u64,
}

struct Entry {
    number: u64,
    remote: String,
    guest: Option<IpAddr>,
    state: State,
}

enum State {
    /// It is being opened.
    Taken,
    /// These forwards of the dataplane: protocol and listen address.
    Forwards(Vec<(v1::Protocol, String)>),
    /// A socket that leads over SSH.
    Ssh,
}

/// Why a place cannot be taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum TakeError {
    /// It is exposed already.
    Running,
    /// The guest has as many as it may.
    GuestLimit,
    /// The table is full.
    Full,
}

/// A place that is taken. It is free again when this is dropped, unless it was [opened](Taken::opened).
pub(super) struct Taken {
    exposed: Exposed,
    key: Option<Key>,
}

/// What is to be closed.
pub(super) enum Closing {
    /// Forwards of the dataplane.
    Forwards(Vec<(v1::Protocol, String)>),
    /// A socket that leads over SSH.
    Ssh,
}

/// What is exposed, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row {
    pub(super) local: String,
    pub(super) protocol: Kind,
    pub(super) remote: String,
}

impl Exposed {
    /// Takes a place.
    pub(super) fn take(
        &self,
        kind: Kind,
        local: &str,
        remote: &str,
        guest: Option<IpAddr>,
    ) -> Result<Taken, TakeError> {
        let mut table = self.table();
        let key = (local.to_owned(), kind);
        if table.entries.contains_key(&key) {
            return Err(TakeError::Running);
        }
        if table.entries.len() >= EXPOSED_MAX {
            return Err(TakeError::Full);
        }
        if guest.is_some() {
            let own = table.entries.values().filter(|entry| entry.guest == guest);
            if own.count() >= GUEST_FORWARDS_MAX {
                return Err(TakeError::GuestLimit);
            }
        }
        table.last += 1;
        let entry = Entry {
            number: table.last,
            remote: remote.to_owned(),
            guest,
            state: State::Taken,
        };
        table.entries.insert(key.clone(), entry);
        Ok(Taken {
            exposed: self.clone(),
            key: Some(key),
        })
    }

    /// Marks this moment: what is exposed later is not forgotten by [`Exposed::forget`].
    pub(super) fn mark(&self) -> u64 {
        self.table().last
    }

    /// Forgets what was exposed up to a mark and none of whose forwards is among these, which were asked for after
    /// it: someone else closed them.
    pub(super) fn forget(&self, mark: u64, forwards: &[v1::Forward]) {
        let there: HashSet<(v1::Protocol, &str)> = forwards
            .iter()
            .map(|f| (f.protocol(), f.listen.as_str()))
            .collect();
        self.table().entries.retain(|_, entry| match &entry.state {
            State::Forwards(own) if entry.number <= mark => own
                .iter()
                .any(|(protocol, listen)| there.contains(&(*protocol, listen.as_str()))),
            _ => true,
        });
    }

    /// What is open; of one guest, what it has exposed.
    pub(super) fn rows(&self, guest: Option<IpAddr>) -> Vec<Row> {
        let table = self.table();
        let open = table.entries.iter().filter(|(_, entry)| {
            !matches!(entry.state, State::Taken) && (guest.is_none() || entry.guest == guest)
        });
        open.map(|((local, kind), entry)| Row {
            local: local.clone(),
            protocol: *kind,
            remote: entry.remote.clone(),
        })
        .collect()
    }

    /// Where the forwards listen that were exposed here.
    pub(super) fn listens(&self) -> HashSet<(v1::Protocol, String)> {
        let table = self.table();
        let mut all = HashSet::new();
        for entry in table.entries.values() {
            if let State::Forwards(own) = &entry.state {
                all.extend(own.iter().cloned());
            }
        }
        all
    }

    /// What is exposed and has a place, in the words that it was asked for by; for a guest, of its own alone.
    pub(super) fn in_the_way(
        &self,
        protocol: v1::Protocol,
        taken: &ForwardListen,
        guest: Option<IpAddr>,
    ) -> Option<String> {
        let is_there = |(of, listen): &(v1::Protocol, String)| {
            let listen = listen.parse::<ForwardListen>();
            *of == protocol && listen.is_ok_and(|listen| listen.overlaps(taken))
        };
        let table = self.table();
        let mut entries = table.entries.iter();
        let found = entries.find(|(_, entry)| match &entry.state {
            State::Forwards(own) if guest.is_none() || entry.guest == guest => own.iter().any(is_there),
            _ => false,
        });
        found.map(|((local, _), _)| local.clone())
    }

    /// What a place stands for, to be closed; nothing where it is not open, or another's than this guest's. It stays in
    /// the table until it is [closed](Exposed::closed).
    pub(super) fn closing(&self, kind: Kind, local: &str, guest: Option<IpAddr>) -> Option<Closing> {
        let table = self.table();
        let entry = table.entries.get(&(local.to_owned(), kind))?;
        if guest.is_some() && entry.guest != guest {
            return None;
        }
        match &entry.state {
            State::Taken => None,
            State::Forwards(own) => Some(Closing::Forwards(own.clone())),
            State::Ssh => Some(Closing::Ssh),
        }
    }

    /// What a place stood for is closed.
    pub(super) fn closed(&self, kind: Kind, local: &str) {
        let mut table = self.table();
        let key = (local.to_owned(), kind);
        if table
            .entries
            .get(&key)
            .is_some_and(|entry| !matches!(entry.state, State::Taken))
        {
            table.entries.remove(&key);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // What is done under it does not panic half way.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, key: &Key, state: State) {
        let mut table = self.table();
        table.last += 1;
        let number = table.last;
        if let Some(entry) = table.entries.get_mut(key) {
            entry.state = state;
            // Counted from now: a list that was asked for before does not have its forwards.
            entry.number = number;
        }
    }
}

impl Taken {
    /// It is open: forwards of the dataplane.
    pub(super) fn opened(mut self, forwards: Vec<(v1::Protocol, String)>) {
        if let Some(key) = self.key.take() {
            self.exposed.open(&key, State::Forwards(forwards));
        }
    }

    /// It is open: a socket that leads over SSH.
    pub(super) fn over_ssh(mut self) {
        if let Some(key) = self.key.take() {
            self.exposed.open(&key, State::Ssh);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.exposed.table().entries.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::new(192, 168, 127, 2)));

    fn forward(listen: &str) -> v1::Forward {
        v1::Forward {
            protocol: v1::Protocol::Tcp.into(),
            listen: listen.to_owned(),
            ..Default::default()
        }
    }

    fn open(exposed: &Exposed, local: &str, guest: Option<IpAddr>) {
        let taken = exposed
            .take(Kind::Tcp, local, "192.168.127.2:80", guest)
            .ok()
            .unwrap();
        taken.opened(vec![(v1::Protocol::Tcp, local.to_owned())]);
    }

    #[test]
    fn a_place_is_one_askers_until_it_is_given_up_and_then_the_next_ones() {
        let exposed = Exposed::default();
        let taken = exposed.take(Kind::Tcp, ":80", "x", None).ok().unwrap();
        assert_eq!(
            exposed.take(Kind::Tcp, ":80", "x", None).err(),
            Some(TakeError::Running)
        );
        assert!(exposed.take(Kind::Udp, ":80", "x", None).is_ok());
        assert!(exposed.rows(None).is_empty(), "not open yet");
        assert!(exposed.closing(Kind::Tcp, ":80", None).is_none());
        drop(taken);
        open(&exposed, ":80", None);
        assert_eq!(exposed.rows(None).len(), 1);
    }

    #[test]
    fn guests_and_the_table_have_their_limits() {
        let exposed = Exposed::default();
        for port in 0..GUEST_FORWARDS_MAX {
            open(&exposed, &format!(":{port}"), GUEST);
        }
        let more = |guest| exposed.take(Kind::Tcp, "more", "x", guest).err();
        assert_eq!(more(GUEST), Some(TakeError::GuestLimit));
        assert_eq!(more(None), None, "the host's own are not counted for it");
        let held: Vec<Taken> = (GUEST_FORWARDS_MAX..EXPOSED_MAX)
            .map(|port| {
                exposed
                    .take(Kind::Udp, &port.to_string(), "x", None)
                    .ok()
                    .unwrap()
            })
            .collect();
        assert_eq!(more(None), Some(TakeError::Full));
        drop(held);
        assert_eq!(more(None), None);
    }

    #[test]
    fn what_others_closed_is_forgotten_and_what_was_opened_meanwhile_is_not() {
        let exposed = Exposed::default();
        open(&exposed, "127.0.0.1:1", None);
        open(&exposed, "127.0.0.1:2", None);
        let mark = exposed.mark();
        open(&exposed, "127.0.0.1:3", None);
        exposed.forget(mark, &[forward("127.0.0.1:2")]);
        let left: Vec<String> = exposed.rows(None).into_iter().map(|row| row.local).collect();
        assert_eq!(left, ["127.0.0.1:2", "127.0.0.1:3"]);
    }

    #[test]
    fn a_guest_closes_only_its_own() {
        let exposed = Exposed::default();
        open(&exposed, ":1", None);
        open(&exposed, ":2", GUEST);
        assert!(exposed.closing(Kind::Tcp, ":1", GUEST).is_none());
        assert!(exposed.closing(Kind::Tcp, ":2", GUEST).is_some());
        assert!(
            exposed.closing(Kind::Tcp, ":2", None).is_some(),
            "the host closes any"
        );
        assert_eq!(exposed.rows(GUEST).len(), 1);
        exposed.closed(Kind::Tcp, ":2");
        assert!(exposed.rows(GUEST).is_empty());
    }
}

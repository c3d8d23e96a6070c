//! What a guest brings about again and again becomes one event with a count.
//!
//! The first denial of a target for a reason is told at once. Those that follow within [`WINDOW`] are
//! counted, and told in one event when it is over; so are lookups that were answered, and limits that
//! were reached. What is kept of one VM is bounded ([`KEYS_PER_VM_MAX`]): beyond it, what is new is
//! counted without its target. So a guest makes so many events a window, however hard it tries.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{Name, Protocol, Reason, Subject};
use vnet_proto::v1;

/// How long what is alike is counted before it is told.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// Targets and reasons kept apart of one VM; the rest is counted together.
pub(super) const KEYS_PER_VM_MAX: usize = 512;

/// What makes two events alike.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    kind: v1::EventKind,
    what: What,
    would_deny: bool,
}

#[derive(Debug, PartialEq, Eq, Hash)]
enum What {
    /// A destination, whichever port the guest called from, and the step and subject of the reason.
    Flow(Protocol, SocketAddr, String, String),
    /// A name and record type, and likewise.
    Lookup(Name, u16, String, String),
    /// A forward by where it would listen and the guest's port, and likewise.
    Forward(Protocol, SocketAddr, u16, String, String),
    /// A limit, by what is said of it.
    Limit(String),
    /// Everything that found no room.
    Rest,
}

/// What was told once and is counted since.
#[derive(Debug)]
struct Counted {
    /// The last of them.
    event: v1::Event,
    /// How many since the last was told.
    count: u64,
    /// When they are told, or forgotten if there are none.
    due: Due,
}

/// A moment, and a number that tells apart what is due at the same one.
type Due = (SystemTime, u64);

/// Everything that is being counted.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    vms: HashMap<String, HashMap<Arc<Key>, Counted>>,
    due: BTreeMap<Due, (String, Arc<Key>)>,
    last: u64,
}

impl Key {
    /// Of a decision on a flow or lookup.
    pub(super) fn decided(kind: v1::EventKind, subject: &Subject, reason: &Reason, would_deny: bool) -> Self {
        let (step, why) = (reason.step.clone(), reason.subject.clone());
        let what = match subject {
            Subject::Flow(flow) => What::Flow(flow.key.protocol, flow.key.peer, step, why),
            Subject::Lookup(lookup) => What::Lookup(lookup.name.clone(), lookup.query_type, step, why),
        };
        Self {
            kind,
            what,
            would_deny,
        }
    }

    /// Of a forward that was refused.
    pub(super) fn forward(protocol: Protocol, listen: SocketAddr, port: u16, reason: &Reason) -> Self {
        let (step, why) = (reason.step.clone(), reason.subject.clone());
        Self {
            kind: v1::EventKind::ForwardDenied,
            what: What::Forward(protocol, listen, port, step, why),
            would_deny: false,
        }
    }

    /// Of a limit that was reached.
    pub(super) fn limit(text: &str) -> Self {
        Self {
            kind: v1::EventKind::LimitReached,
            what: What::Limit(text.to_owned()),
            would_deny: false,
        }
    }

    /// What stands for this one where there is no room for it.
    fn rest(&self) -> Self {
        Self {
            kind: self.kind,
            what: What::Rest,
            would_deny: self.would_deny,
        }
    }
}

impl Repeats {
    /// Gives an event back to be told now, or counts it. It stands for `count` of its kind.
    pub(super) fn note(
        &mut self,
        now: SystemTime,
        key: Key,
        count: u64,
        event: v1::Event,
    ) -> Option<v1::Event> {
        let of_vm = self.vms.entry(event.vm.clone()).or_default();
        let mut key = Arc::new(key);
        if !of_vm.contains_key(&key) && of_vm.len() >= KEYS_PER_VM_MAX {
            key = Arc::new(key.rest());
        }
        if let Some(counted) = of_vm.get_mut(&key) {
            counted.count = counted.count.saturating_add(count);
            counted.event = event;
            return None;
        }
        self.last += 1;
        let due = (now + WINDOW, self.last);
        self.due.insert(due, (event.vm.clone(), Arc::clone(&key)));
        let counted = Counted {
            event: event.clone(),
            count: 0,
            due,
        };
        of_vm.insert(key, counted);
        Some(told(event, count))
    }

    /// What is to be told by `now`.
    pub(super) fn due(&mut self, now: SystemTime) -> Vec<v1::Event> {
        let mut events = Vec::new();
        while let Some(entry) = self.due.first_entry().filter(|entry| entry.key().0 <= now) {
            let (vm, key) = entry.remove();
            let Some(of_vm) = self.vms.get_mut(&vm) else {
                continue;
            };
            match of_vm.get_mut(&key) {
                // It goes on: one event a window, and none at once.
                Some(counted) if counted.count > 0 => {
                    self.last += 1;
                    counted.due = (now + WINDOW, self.last);
                    events.push(counted.take(&key));
                    self.due.insert(counted.due, (vm, key));
                }
                _ => {
                    of_vm.remove(&key);
                    if of_vm.is_empty() {
                        self.vms.remove(&vm);
                    }
                }
            }
        }
        events
    }

    /// What was counted so far and not told: somebody reads.
    pub(super) fn so_far(&mut self) -> Vec<v1::Event> {
        let mut events: Vec<(Due, v1::Event)> = self
            .vms
            .values_mut()
            .flatten()
            .filter(|(_, counted)| counted.count > 0)
            .map(|(key, counted)| (counted.due, counted.take(key)))
            .collect();
        events.sort_by_key(|(due, _)| *due);
        events.into_iter().map(|(_, event)| event).collect()
    }

    /// The last of a VM that is gone.
    pub(super) fn end_of(&mut self, vm: &str) -> Vec<v1::Event> {
        let mut counted: Vec<_> = self.vms.remove(vm).into_iter().flatten().collect();
        counted.sort_by_key(|(_, counted)| counted.due);
        let mut events = Vec::new();
        for (key, mut counted) in counted {
            self.due.remove(&counted.due);
            if counted.count > 0 {
                events.push(counted.take(&key));
            }
        }
        events
    }
}

impl Counted {
    fn take(&mut self, key: &Key) -> v1::Event {
        let count = std::mem::take(&mut self.count);
        let event = self.event.clone();
        if key.what != What::Rest {
            return told(event, count);
        }
        told(
            v1::Event {
                kind: event.kind,
                vm: event.vm,
                network: event.network,
                action: event.action,
                would_deny: event.would_deny,
                text: "others like it, to more targets than are kept apart".to_owned(),
                ..Default::default()
            },
            count,
        )
    }
}

/// One is not said: it is what no count means.
fn told(event: v1::Event, count: u64) -> v1::Event {
    v1::Event {
        count: if count > 1 { count } else { 0 },
        ..event
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::flow;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn reason(subject: &str) -> Reason {
        Reason::new("rule", subject, "denied")
    }

    fn deny(repeats: &mut Repeats, now: u64, vm: &str, to: &str, why: &str, count: u64) -> Option<v1::Event> {
        let kind = v1::EventKind::FlowDenied;
        let event = v1::Event {
            kind: kind.into(),
            vm: vm.to_owned(),
            text: why.to_owned(),
            ..Default::default()
        };
        let key = Key::decided(kind, &flow(to, &[]), &reason(why), false);
        repeats.note(at(now), key, count, event)
    }

    fn counts(events: &[v1::Event]) -> Vec<u64> {
        events.iter().map(|e| e.count).collect()
    }

    #[test]
    fn the_first_is_told_at_once_and_the_rest_when_the_window_is_over() {
        let mut repeats = Repeats::default();
        assert_eq!(
            deny(&mut repeats, 0, "a", "192.0.2.1:80", "r", 1).unwrap().count,
            0
        );
        for second in 1..=50 {
            assert!(deny(&mut repeats, second, "a", "192.0.2.1:80", "r", 2).is_none());
        }
        assert!(repeats.due(at(59)).is_empty());
        assert_eq!(counts(&repeats.due(at(60))), [100]);
        // It goes on, and so does the window.
        assert!(deny(&mut repeats, 61, "a", "192.0.2.1:80", "r", 1).is_none());
        assert_eq!(counts(&repeats.due(at(120))), [0], "one more");
        assert!(repeats.due(at(180)).is_empty());
        assert!(
            repeats.vms.is_empty() && repeats.due.is_empty(),
            "nothing is left"
        );
        assert!(deny(&mut repeats, 181, "a", "192.0.2.1:80", "r", 1).is_some());
    }

    #[test]
    fn another_vm_target_or_reason_is_another_event() {
        let mut repeats = Repeats::default();
        assert!(deny(&mut repeats, 0, "a", "192.0.2.1:80", "r", 1).is_some());
        assert!(deny(&mut repeats, 0, "b", "192.0.2.1:80", "r", 1).is_some());
        assert!(deny(&mut repeats, 0, "a", "192.0.2.1:81", "r", 1).is_some());
        assert!(deny(&mut repeats, 0, "a", "192.0.2.1:80", "s", 1).is_some());
    }

    #[test]
    fn a_guest_makes_so_many_events_a_window_and_the_rest_is_counted() {
        let mut repeats = Repeats::default();
        let attempts = KEYS_PER_VM_MAX as u64 + 1000;
        let mut told = 0;
        for n in 0..attempts {
            let to = format!("10.0.{}.{}:80", n / 256, n % 256);
            told += u64::from(deny(&mut repeats, 0, "a", &to, "r", 1).is_some());
        }
        // The first that found no room is told, and stands for those that follow.
        assert_eq!(told, KEYS_PER_VM_MAX as u64 + 1);
        assert!(
            deny(&mut repeats, 0, "b", "192.0.2.1:80", "r", 1).is_some(),
            "another VM has its own room"
        );
        assert_eq!(repeats.vms["a"].len(), KEYS_PER_VM_MAX + 1);

        let rest = repeats.due(at(60));
        assert_eq!(counts(&rest), [attempts - KEYS_PER_VM_MAX as u64 - 1]);
        assert!(rest[0].tuple.is_none() && rest[0].vm == "a" && rest[0].text.starts_with("others"));
    }

    #[test]
    fn what_was_counted_is_told_to_a_reader_and_when_its_vm_is_gone() {
        let mut repeats = Repeats::default();
        for _ in 0..4 {
            deny(&mut repeats, 0, "a", "192.0.2.1:80", "r", 1);
        }
        assert_eq!(counts(&repeats.so_far()), [3]);
        assert!(repeats.so_far().is_empty());
        deny(&mut repeats, 1, "a", "192.0.2.1:80", "r", 1);
        deny(&mut repeats, 1, "a", "192.0.2.1:80", "r", 1);
        assert_eq!(counts(&repeats.end_of("a")), [2]);
        assert!(repeats.vms.is_empty() && repeats.due.is_empty());
    }
}

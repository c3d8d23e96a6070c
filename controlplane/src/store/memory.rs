//! `memory:`: a store for throw-away runs, and the reference that SQLite is tested against.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use vnet_proto::v1;

use super::retention::Census;
use super::{
    Class, EventQuery, History, LISTED_REVISIONS_MAX, Snapshot, Store, StoreError, StoredGrant, StoredVm,
    Write, confirmed, fallback_of,
};
use crate::lists::described;

/// State and history that are gone with the process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    grants: BTreeMap<String, StoredGrant>,
    policies: BTreeMap<String, BTreeMap<u64, v1::Policy>>,
    /// The content of lists, by their digests.
    lists: BTreeMap<String, Vec<u8>>,
    vms: BTreeMap<String, StoredVm>,
    events: BTreeMap<u64, v1::Event>,
    by_class: BTreeMap<Class, BTreeSet<u64>>,
    /// Of the traffic.
    by_vm: BTreeMap<String, BTreeSet<u64>>,
    census: Census,
}

impl MemoryStore {
    fn let_go(&mut self, sequence: u64) {
        let Some(event) = self.events.remove(&sequence) else {
            return;
        };
        let class = Class::of(&event);
        if let Some(sequences) = self.by_class.get_mut(&class) {
            sequences.remove(&sequence);
        }
        if class == Class::Traffic
            && let Some(sequences) = self.by_vm.get_mut(&event.vm)
        {
            sequences.remove(&sequence);
            if sequences.is_empty() {
                self.by_vm.remove(&event.vm);
            }
        }
        self.census.remove(class, &event.vm, 1);
    }
}

impl MemoryStore {
    /// Lets go of lists that none of the last revisions names, nor what the last may fall back to.
    fn prune_lists(&mut self) {
        let kept = self.policies.values().flat_map(|revisions| {
            let last = revisions.last_key_value();
            let from = last.map_or(0, |(last, _)| last.saturating_sub(LISTED_REVISIONS_MAX - 1));
            let fallback = last.and_then(|(_, policy)| revisions.get(&fallback_of(policy)?));
            let last_ones = revisions.range(from..).map(|(_, policy)| policy);
            last_ones.chain(fallback).flat_map(|policy| &policy.lists)
        });
        let kept: BTreeSet<&str> = kept.map(|list| list.sha256.as_str()).collect();
        self.lists.retain(|digest, _| kept.contains(digest.as_str()));
    }

    fn with_lists(&self, policy: &v1::Policy) -> v1::Policy {
        let mut policy = policy.clone();
        for list in &mut policy.lists {
            list.content = self.lists.get(&list.sha256).cloned().unwrap_or_default();
        }
        policy
    }
}

impl Store for MemoryStore {
    fn load(&mut self) -> Result<Snapshot, StoreError> {
        let last = self.policies.values().filter_map(|p| p.values().next_back());
        let fallbacks = last
            .clone()
            .filter_map(|policy| self.policies.get(&policy.name)?.get(&fallback_of(policy)?));
        Ok(Snapshot {
            grants: self.grants.values().cloned().collect(),
            policies: last.clone().map(|p| self.with_lists(p)).collect(),
            fallbacks: fallbacks.map(|p| self.with_lists(p)).collect(),
            vms: self.vms.clone(),
        })
    }

    fn apply(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        for write in writes {
            match write {
                Write::PutGrant(stored) => {
                    self.grants
                        .insert(stored.grant.id.clone(), StoredGrant::clone(stored));
                }
                Write::DeleteGrant(id) => {
                    self.grants.remove(id);
                }
                Write::PutPolicy(policy) => {
                    let revisions = self.policies.entry(policy.name.clone()).or_default();
                    // One that comes without its content is there already.
                    for list in policy.lists.iter().filter(|list| !list.content.is_empty()) {
                        self.lists
                            .entry(list.sha256.clone())
                            .or_insert_with(|| list.content.clone());
                    }
                    let lists = described(&policy.lists);
                    revisions.insert(
                        policy.revision,
                        v1::Policy {
                            lists,
                            ..policy.clone()
                        },
                    );
                    self.prune_lists();
                }
                Write::ConfirmPolicy { name, revision } => {
                    let revisions = self.policies.get_mut(name);
                    if let Some(policy) = revisions.and_then(|r| r.get_mut(revision)) {
                        *policy = confirmed(std::mem::take(policy));
                    }
                }
                Write::PutVm(name, Some(stored)) => {
                    self.vms.insert(name.clone(), stored.clone());
                }
                Write::PutVm(name, None) => {
                    self.vms.remove(name);
                }
            }
        }
        Ok(())
    }

    fn policy(&mut self, name: &str, revision: u64) -> Result<Option<v1::Policy>, StoreError> {
        let found = self.policies.get(name).and_then(|r| r.get(&revision));
        Ok(found.map(|policy| self.with_lists(policy)))
    }

    fn revisions(&mut self, name: &str, before: u64, limit: usize) -> Result<Vec<v1::Policy>, StoreError> {
        let before = if before == 0 { u64::MAX } else { before };
        let revisions = self
            .policies
            .get(name)
            .into_iter()
            .flat_map(|r| r.range(..before).rev());
        Ok(revisions
            .take(limit)
            .map(|(_, p)| v1::Policy {
                document: String::new(),
                ..p.clone()
            })
            .collect())
    }

    fn append_events(&mut self, events: &[v1::Event]) -> Result<u64, StoreError> {
        let mut gone = 0;
        for event in events {
            let (sequence, class) = (event.sequence, Class::of(event));
            self.let_go(sequence);
            self.events.insert(sequence, event.clone());
            self.by_class.entry(class).or_default().insert(sequence);
            self.census.add(class, &event.vm, 1);
            if class == Class::Traffic {
                let of_vm = self.by_vm.entry(event.vm.clone()).or_default();
                of_vm.insert(sequence);
                if self.census.excess_of_vm(&event.vm) > 0
                    && let Some(oldest) = of_vm.first().copied()
                {
                    self.let_go(oldest);
                    gone += 1;
                }
            }
            if self.census.excess(class) > 0
                && let Some(oldest) = self.by_class.get(&class).and_then(|s| s.first()).copied()
            {
                self.let_go(oldest);
                gone += 1;
            }
        }
        Ok(gone)
    }

    fn events(&mut self, query: &EventQuery) -> Result<Vec<v1::Event>, StoreError> {
        let fits = |event: &&v1::Event| {
            let time = event.time.and_then(|t| SystemTime::try_from(t).ok());
            (query.before == 0 || event.sequence < query.before)
                && event.sequence > query.after
                && (query.kinds.is_empty() || query.kinds.contains(&event.kind))
                && query.start.is_none_or(|start| time.is_some_and(|t| t >= start))
                && query.end.is_none_or(|end| time.is_some_and(|t| t < end))
        };
        let fitting = self.events.values().filter(fits);
        Ok(if query.oldest_first {
            fitting.take(query.limit).cloned().collect()
        } else {
            fitting.rev().take(query.limit).cloned().collect()
        })
    }

    fn open_history(&mut self) -> Result<History, StoreError> {
        Ok(History {
            last_sequence: self.events.last_key_value().map_or(0, |(sequence, _)| *sequence),
            cut_off: false,
        })
    }

    fn close_history(&mut self) -> Result<(), StoreError> {
        Ok(())
    }
}

//! Verdicts on names: one table for lookups, one for aliases.

use std::sync::Arc;

use ahash::HashMap;
use vnet_proto::model::{LookupMatch, Name};

use super::Decision;

/// Verdicts kept in one table.
const ENTRIES_MAX: usize = 16_384;

/// Decisions by the names that they are about.
#[derive(Default)]
pub(super) struct NameTable {
    any: Option<Arc<Decision>>,
    exact: HashMap<Name, Arc<Decision>>,
    below: HashMap<Name, Arc<Decision>>,
}

impl NameTable {
    /// The narrowest decision about a name, whether it holds or not.
    pub(super) fn find(&self, name: &Name) -> Option<&Arc<Decision>> {
        let found = self.exact.get(name).or_else(|| {
            if self.below.is_empty() {
                return None;
            }
            name.ancestors()
                .skip(1)
                .filter_map(|parent| Name::from_canonical(parent).ok())
                .find_map(|parent| self.below.get(&parent))
        });
        found.or(self.any.as_ref())
    }

    /// Keeps a decision. How many went to make room for it: at the limit all that are about some names.
    pub(super) fn install(&mut self, found: &LookupMatch, decision: &Arc<Decision>) -> u64 {
        let mut evicted = 0;
        if self.exact.len() + self.below.len() >= ENTRIES_MAX {
            evicted = (self.exact.len() + self.below.len()) as u64;
            self.exact.clear();
            self.below.clear();
        }
        match found {
            LookupMatch::Exact(name) => drop(self.exact.insert(name.clone(), Arc::clone(decision))),
            LookupMatch::Subdomains(name) => drop(self.below.insert(name.clone(), Arc::clone(decision))),
            LookupMatch::Any => self.any = Some(Arc::clone(decision)),
        }
        evicted
    }

    /// Everything in it.
    pub(super) fn all(&self) -> impl Iterator<Item = (LookupMatch, &Arc<Decision>)> {
        let exact = self
            .exact
            .iter()
            .map(|(name, d)| (LookupMatch::Exact(name.clone()), d));
        let below = self
            .below
            .iter()
            .map(|(name, d)| (LookupMatch::Subdomains(name.clone()), d));
        let any = self.any.iter().map(|d| (LookupMatch::Any, d));
        exact.chain(below).chain(any)
    }
}

#[cfg(test)]
mod tests {
    use vnet_proto::model::{Match, VerdictAction};

    use super::*;
    use crate::engine::Time;
    use crate::engine::cache::Standing;
    use crate::engine::cache::tests::verdict_on;

    #[test]
    fn a_full_table_forgets_all_names_and_counts_them() {
        let verdict = verdict_on(VerdictAction::Deny, Match::Alias(LookupMatch::Any));
        let decision = Arc::new(Decision::new(Time::ZERO, &verdict, Standing::default(), None));
        let name = |i: usize| format!("n{i}.test").parse::<Name>().unwrap();
        let mut table = NameTable::default();
        let evicted: u64 = (0..ENTRIES_MAX)
            .map(|i| table.install(&LookupMatch::Exact(name(i)), &decision))
            .sum();
        assert_eq!((evicted, table.all().count()), (0, ENTRIES_MAX));
        let last = LookupMatch::Subdomains(name(ENTRIES_MAX));
        assert_eq!(table.install(&last, &decision), ENTRIES_MAX as u64);
        assert_eq!(table.all().count(), 1);
        assert!(table.find(&name(0)).is_none());
    }
}

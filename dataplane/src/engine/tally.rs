//! Counts what was decided without a miss of its own, for one report a second.

use std::sync::Arc;

use ahash::HashMap;
use vnet_proto::model::{Subject, VmId};

use crate::engine::cache::Decision;
use crate::engine::held::Target;
use crate::message::Report;

/// Different targets counted between two reports.
pub(super) const TARGETS_MAX: usize = 1_024;

/// What was decided since the last report.
#[derive(Default)]
pub(super) struct Tally {
    counts: HashMap<Target, (u64, Subject, Arc<Decision>)>,
    /// Decisions that found no room here; they are counted, not named.
    pub unnamed: u64,
}

impl Tally {
    /// Counts one. `subject` is made only for a target not yet counted.
    pub(super) fn count(
        &mut self,
        target: Target,
        decision: &Arc<Decision>,
        subject: impl FnOnce() -> Subject,
    ) {
        if let Some((count, _, last)) = self.counts.get_mut(&target) {
            *count += 1;
            *last = Arc::clone(decision);
        } else if self.counts.len() < TARGETS_MAX {
            self.counts.insert(target, (1, subject(), Arc::clone(decision)));
        } else {
            self.unnamed += 1;
        }
    }

    /// Takes what is to be reported.
    pub(super) fn take(&mut self, vm: VmId) -> Vec<Report> {
        self.counts
            .drain()
            .map(|(_, (count, subject, decision))| Report::Decided {
                vm,
                subject,
                action: decision.action,
                reason: decision.reason.clone(),
                count,
                would_deny: decision.would_deny,
            })
            .collect()
    }
}

//! What a TCP connection's bytes are held to: the inspector, how far the ring was shown to it, and its clock.

use std::sync::Arc;

use crate::engine::Time;
use crate::engine::inspect::{Demand, InspectRefusal, Inspector, NAME_PATIENCE, NameList, Progress};

/// Stands between a connection's receive ring and whoever takes from it.
pub(in crate::engine) struct Check {
    inspector: Inspector<Arc<NameList>>,
    /// Bytes taken out of the ring.
    taken: u64,
    clock: Patience,
    refusal: Option<InspectRefusal>,
}

impl Check {
    /// Of a connection of which nothing was read.
    pub(super) fn new(demand: Demand<Arc<NameList>>) -> Self {
        Self {
            inspector: Inspector::new(demand),
            taken: 0,
            clock: Patience::default(),
            refusal: None,
        }
    }

    /// Bytes at the ring's beginning that were shown already.
    pub(in crate::engine) fn ahead(&self) -> usize {
        usize::try_from(self.inspector.seen().saturating_sub(self.taken)).unwrap_or(usize::MAX)
    }

    /// Shows the guest's bytes that follow. Whether it makes sense to show what is left of them.
    pub(in crate::engine) fn show(&mut self, bytes: &[u8]) -> bool {
        if self.refusal.is_some() {
            return false;
        }
        let before = self.inspector.seen();
        let progress = self.inspector.handle(bytes);
        self.note(progress);
        self.refusal.is_none() && !self.inspector.is_open() && self.inspector.seen() > before
    }

    /// Shows bytes of the server's, if what the guest says next depends on them.
    pub(in crate::engine) fn show_answer(&mut self, bytes: &[u8]) {
        if self.inspector.wants_answer() && self.refusal.is_none() {
            let progress = self.inspector.handle_answer(bytes);
            self.note(progress);
        }
    }

    /// Bytes that may be taken out of the ring now.
    pub(in crate::engine) fn allowed(&self) -> usize {
        if self.refusal.is_some() {
            return 0;
        }
        usize::try_from(self.inspector.passed().saturating_sub(self.taken)).unwrap_or(usize::MAX)
    }

    /// So many were taken.
    pub(in crate::engine) fn note_taken(&mut self, bytes: usize) {
        self.taken += bytes as u64;
    }

    /// Whether everything may pass, whatever follows.
    pub(in crate::engine) fn is_over(&self) -> bool {
        self.refusal.is_none() && self.inspector.is_open()
    }

    /// Whether anything may pass: the first name was spoken, or none is needed.
    pub(super) fn has_passed(&self) -> bool {
        self.refusal.is_none() && self.inspector.passed() > 0
    }

    /// Why nothing may pass any more, if that is so by now.
    pub(in crate::engine) fn refusal(&mut self, now: Time) -> Option<InspectRefusal> {
        if self.refusal.is_none() {
            self.clock
                .look(now, self.inspector.is_waiting(), self.inspector.passed());
            if self.clock.is_over(now) {
                let progress = self.inspector.handle_late();
                self.note(progress);
            }
        }
        self.refusal.clone()
    }

    /// When [`Self::refusal`] is to be asked again, if nothing else happens.
    pub(in crate::engine) fn deadline(&self) -> Option<Time> {
        self.clock.deadline()
    }

    fn note(&mut self, progress: Progress) {
        if let Progress::Refuse(refusal) = progress {
            self.refusal = Some(refusal);
        }
    }
}

/// How long the guest has been owing something.
#[derive(Debug, Default)]
pub(super) struct Patience(Option<(Time, u64)>);

impl Patience {
    /// Looks whether something is owed now. What passes meanwhile pays a debt; another may begin with it.
    pub(super) fn look(&mut self, now: Time, is_waiting: bool, passed: u64) {
        self.0 = match self.0 {
            _ if !is_waiting => None,
            Some((since, before)) if before == passed => Some((since, before)),
            _ => Some((now, passed)),
        };
    }

    /// When it is over.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.0.map(|(since, _)| since + NAME_PATIENCE)
    }

    /// Whether it is.
    pub(super) fn is_over(&self, now: Time) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }
}

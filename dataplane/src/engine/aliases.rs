//! Aliases: the names that an upstream's answer leads through, judged before the answer is acted on.
//!
//! The guest asked for one name and was allowed it; the answer may lead through others (CNAME, RFC 1034 §3.6.2), and
//! one of these may be refused. What happens to an answer, top to bottom, is `Engine::judge_answer`: each of its
//! aliases is looked up in the verdict cache, where aliases have a table of their own; those that are not there are
//! misses, and the answer waits. Once all are allowed it goes on as if nothing had been asked. One that is refused
//! refuses the lookup. One that is not decided in time does so too.
//!
//! Owns the answers that wait, the guest's and those of the engine's own lookups. Each is one of
//! [`UPSTREAM_MAX`](crate::engine::gateway::dns::UPSTREAM_MAX) queries or of
//! [`LOOKUPS_MAX`](crate::engine::synthetic::table::LOOKUPS_MAX) lookups, so that their number is bounded there.

use std::collections::BTreeSet;
use std::sync::Arc;

use ahash::AHashMap;
use vnet_proto::model::{LookupSubject, Name, Reason, VerdictAction};

use crate::engine::cache::Decision;
use crate::engine::frame::DropReason;
use crate::engine::gateway::dns::message::{ALIASES_MAX, Upstream};
use crate::engine::{Engine, Time};
use crate::message::{MissEnd, Report};

/// Bytes of the answers of one guest that wait; what is beyond is refused.
pub const WAITING_BYTES_MAX: usize = 4 << 20;

/// The answers of one guest that wait for verdicts on their aliases.
#[derive(Debug, Default)]
pub(super) struct Aliases {
    waiting: AHashMap<u64, Waiting>,
    /// By the aliases that are not decided.
    by_name: AHashMap<Name, BTreeSet<u64>>,
    by_deadline: BTreeSet<(Time, u64)>,
    bytes: usize,
    /// Lookups that were refused for an alias.
    pub(super) refused: u64,
    /// Lookups that were refused since their aliases were too many, or there was no room to ask about them.
    pub(super) beyond_limit: u64,
}

/// One answer.
#[derive(Debug)]
struct Waiting {
    answer: Vec<u8>,
    /// The type that was asked for.
    query_type: u16,
    /// Its aliases, and what was decided of those that it waited for.
    aliases: Vec<(Name, Option<Arc<Decision>>)>,
    deadline: Time,
}

impl Aliases {
    fn insert(&mut self, query: u64, waiting: Waiting) {
        for (name, _) in waiting.aliases.iter().filter(|(_, decided)| decided.is_none()) {
            self.by_name.entry(name.clone()).or_default().insert(query);
        }
        self.by_deadline.insert((waiting.deadline, query));
        self.bytes += waiting.answer.len();
        self.waiting.insert(query, waiting);
    }

    fn take(&mut self, query: u64) -> Option<Waiting> {
        let waiting = self.waiting.remove(&query)?;
        self.bytes -= waiting.answer.len();
        self.by_deadline.remove(&(waiting.deadline, query));
        for (name, _) in &waiting.aliases {
            if let Some(queries) = self.by_name.get_mut(name) {
                queries.remove(&query);
                if queries.is_empty() {
                    self.by_name.remove(name);
                }
            }
        }
        Some(waiting)
    }

    /// Those that wait for a verdict on an alias, oldest first.
    fn waiting_for(&self, name: &Name) -> Vec<u64> {
        self.by_name.get(name).into_iter().flatten().copied().collect()
    }

    fn overdue(&self, now: Time) -> Option<u64> {
        let (at, query) = self.by_deadline.first()?;
        (*at <= now).then_some(*query)
    }

    /// When the first of them has waited long enough.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.by_deadline.first().map(|(at, _)| *at)
    }

    /// Answers that wait.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        debug_assert_eq!(self.waiting.len(), self.by_deadline.len());
        self.waiting.len()
    }
}

impl Engine {
    /// Judges the aliases in an answer, and gives it back if there is nothing to wait for or to refuse.
    pub(super) fn judge_answer(&mut self, now: Time, query: u64, answer: Vec<u8>) -> Option<Vec<u8>> {
        if !self.settings.judges_aliases {
            return Some(answer);
        }
        if self.aliases.waiting.contains_key(&query) {
            // A second answer to one query is none.
            return None;
        }
        let Some((name, query_type)) = self.asked_upstream(query) else {
            return Some(answer);
        };
        // One that cannot be read teaches nothing and is not passed on.
        let Some(found) = Upstream::read(&answer).map(|upstream| upstream.aliases_of(&name)) else {
            return Some(answer);
        };
        let Some(aliases) = found else {
            self.aliases.beyond_limit += 1;
            let text = format!("the answer leads through more than {ALIASES_MAX} aliases");
            let reason = Reason::new("limit", "aliases", text);
            self.refuse_answer(now, query, VerdictAction::Deny, reason);
            return None;
        };
        if aliases.is_empty() {
            return Some(answer);
        }
        let waiting = Waiting {
            answer,
            query_type,
            aliases: aliases.into_iter().map(|name| (name, None)).collect(),
            deadline: now + self.settings.lookup_hold,
        };
        self.weigh(now, query, waiting);
        None
    }

    /// Goes on with an answer, refuses it, or lets it wait, as its aliases are decided now.
    fn weigh(&mut self, now: Time, query: u64, mut waiting: Waiting) {
        let in_force = self.cache.epoch();
        let stands = |decided: &Decision| {
            in_force.is_some_and(|epoch| decided.epoch.stands_under(epoch))
                && decided.expires_at.is_none_or(|at| now <= at)
        };
        for (name, decided) in &mut waiting.aliases {
            // What it waited for may be of an epoch that is over by now: that alias is asked about again.
            if !decided.as_deref().is_some_and(stands) {
                *decided = self.cache.lookup_alias(now, name).cloned();
            }
        }
        let refused = waiting.aliases.iter().find_map(|(name, decided)| {
            let decided = decided.as_ref().filter(|d| d.action != VerdictAction::Allow)?;
            let text = format!("{name}, an alias of it, is refused: {}", decided.reason.text);
            let reason = Reason {
                text,
                ..decided.reason.clone()
            };
            Some((decided.action, reason))
        });
        if let Some((action, reason)) = refused {
            self.aliases.refused += 1;
            self.refuse_answer(now, query, action, reason);
            self.end_unwanted(&waiting, MissEnd::Covered);
            return;
        }
        if waiting.aliases.iter().all(|(_, decided)| decided.is_some()) {
            self.act_on_resolved(now, query, Some(&waiting.answer));
            return;
        }
        if self.aliases.bytes + waiting.answer.len() > WAITING_BYTES_MAX || !self.ask_aliases(&waiting) {
            self.aliases.beyond_limit += 1;
            self.count_drop(DropReason::HeldLimit);
            let text = "too many lookups wait for verdicts on the aliases in their answers; try again";
            let reason = Reason::new("limit", "aliases", text);
            self.refuse_answer(now, query, VerdictAction::Deny, reason);
            self.end_unwanted(&waiting, MissEnd::Evicted);
            return;
        }
        self.dns.await_aliases(query, waiting.deadline);
        self.aliases.insert(query, waiting);
        self.schedule_dns(now);
    }

    /// Asks about the aliases of an answer that are not decided. False at a limit.
    fn ask_aliases(&mut self, waiting: &Waiting) -> bool {
        for (name, _) in waiting.aliases.iter().filter(|(_, decided)| decided.is_none()) {
            match self.held.join_alias(name, waiting.query_type) {
                Some((miss, true)) => {
                    self.ask_lookup(miss, LookupSubject::alias(name.clone(), waiting.query_type));
                }
                Some((_, false)) => {}
                None => return false,
            }
        }
        true
    }

    /// A verdict on an alias that answers wait for.
    pub(super) fn answer_alias(&mut self, now: Time, name: &Name, decision: &Arc<Decision>) {
        for query in self.aliases.waiting_for(name) {
            let Some(mut waiting) = self.aliases.take(query) else {
                continue;
            };
            for (_, decided) in waiting.aliases.iter_mut().filter(|(alias, _)| alias == name) {
                *decided = Some(Arc::clone(decision));
            }
            self.weigh(now, query, waiting);
        }
    }

    /// A query no longer waits: the guest is not there to be answered.
    pub(super) fn abandon_aliases(&mut self, query: u64) {
        if let Some(waiting) = self.aliases.take(query) {
            self.end_unwanted(&waiting, MissEnd::GuestGaveUp);
        }
    }

    /// Refuses what has waited too long: nothing opens that is not decided.
    pub(super) fn expire_aliases(&mut self, now: Time) {
        while let Some(query) = self.aliases.overdue(now) {
            let Some(waiting) = self.aliases.take(query) else {
                break;
            };
            self.end_unwanted(&waiting, MissEnd::HoldExpired);
            if !self.settle_refused(now, query, VerdictAction::Deny) {
                self.dns.handle_undecided_aliases(query);
                self.act_on_dns(now);
            }
        }
    }

    /// Ends the misses about aliases of an answer that nothing waits for any more.
    fn end_unwanted(&mut self, waiting: &Waiting, end: MissEnd) {
        for (name, _) in &waiting.aliases {
            if self.aliases.by_name.contains_key(name) {
                continue;
            }
            let Some(miss) = self.held.alias_miss(name) else {
                continue;
            };
            self.held.take(miss);
            self.report(Report::MissEnded { miss, end });
        }
    }

    /// What a query that went upstream asks for, the guest's or one of ours.
    fn asked_upstream(&self, query: u64) -> Option<(Name, u16)> {
        match self.own_lookup(query) {
            Some(own) => own,
            None => self.dns.asked_upstream(query),
        }
    }

    /// The lookup is refused, as if its name had been.
    fn refuse_answer(&mut self, now: Time, query: u64, action: VerdictAction, reason: Reason) {
        if let Some((name, query_type)) = self.asked_upstream(query) {
            self.report(Report::Decided {
                vm: self.config.vm,
                subject: vnet_proto::model::Subject::Lookup(LookupSubject::new(name, query_type)),
                action,
                reason: reason.clone(),
                count: 1,
                would_deny: false,
            });
        }
        if !self.settle_refused(now, query, action) {
            self.dns.handle_refused(query, action, &reason);
            self.act_on_dns(now);
        }
    }
}

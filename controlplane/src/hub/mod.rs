//! The hub: the one owner of what the controlplane knows, and the only place where it changes.
//!
//! A mutex around plain data, with no await inside: sessions and API handlers call in, and what comes
//! of a call goes out through bounded queues (sessions' outboxes, watches, the store's writer) that
//! never make it wait. So nothing waits on one VM or dataplane while holding what another needs.
//!
//! - [`attach`](self): dataplanes and VMs come and go.
//! - `names`: which VM goes by which name, over a start of the controlplane as well.
//! - `decide`: a miss becomes a verdict or a question.
//! - `traffic`: what dataplanes report of flows, lookups and bindings.
//! - `budgets`: what is used of grants that have one.
//! - `captures`: packets on their way to who asked for them.
//! - `change`: what can alter a decision: the epoch, revocations, cuts.
//! - `verify`: what dataplanes have cached, decided anew.
//! - `confirm`: policies that go by themselves unless they are confirmed.
//! - `claims`: which policy a VM is under.
//! - `answers`, `policies`, `vms`, `commands`: what people and programs do.
//! - `forwards`: what VMs ask to open on the host.
//! - `reach`: what an answer would cover.
//! - `history`: what is recorded, as policies can be asked about it.
//! - `events`: what happened; `repeats`: what happens again and again.

mod answers;
mod attach;
mod bounds;
mod budgets;
mod captures;
mod change;
mod claims;
mod closed;
mod commands;
mod confirm;
mod decide;
mod events;
mod explain;
mod forwards;
mod history;
mod ids;
mod limits;
mod names;
mod nat;
mod policies;
mod reach;
mod repeats;
mod traffic;
mod verify;
mod vms;

#[cfg(test)]
mod budget_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use vnet_proto::model::{Epoch, VmSelector};
use vnet_proto::v1;

use crate::approval::{Change as PendingChange, PendingId, PendingTable};
use crate::clock::{Clock, Now};
use crate::convert;
use crate::fleet::{Fleet, LOST_GRACE};
use crate::grant::{GrantId, Grants, VmInstance};
use crate::metrics::Metrics;
use crate::policy::ListCache;
use crate::refusal::Refusal;
use crate::store::{Durable, History, Snapshot, StoredVm, Write, Writer};
use crate::watch::{Watch, Watchers};

pub use answers::{NewGrant, Reply};
#[cfg(test)]
pub(crate) use attach::Attachment;
pub use attach::SessionKey;
pub use captures::CAPTURES_MAX;
pub(crate) use captures::{MESSAGE_PACKETS_BYTES_MAX, MESSAGE_PACKETS_MAX};
pub use change::Ticket;
pub(crate) use confirm::confirm_within;
pub use events::EventFilter;
pub use forwards::{ForwardWish, WAITS_PER_VM_MAX};
pub use history::{Recalled, Span};
pub(crate) use policies::DEFAULT;
pub(crate) use policies::without_content;
pub use policies::{Applied, Candidate};
pub use reach::{BINDINGS_COUNTED_MAX, LABELS_OFFERED_MAX, Offers, PAST_FLOWS_MAX};
pub use vms::{VmUpdate, Which};

use budgets::Budgets;
use captures::Captures;
use change::Change;
use events::EventLog;
use names::Awaited;
use policies::NamedPolicy;
use repeats::Repeats;

/// How long a cached allow holds without a heartbeat.
pub const LEASE: Duration = Duration::from_secs(60);
/// How often each side of a session says that it is there.
pub const HEARTBEAT: Duration = Duration::from_secs(20);
/// How long a change waits for dataplanes to acknowledge it.
pub const ACK_WAIT: Duration = Duration::from_secs(2);
/// Changes that a watch may fall behind.
const WATCH_QUEUE_MAX: usize = 1_024;
/// Watches of each kind but events: `run` and `up` have one each.
const WATCHES_MAX: usize = 256;
/// Watches of events. Those that do not read may each keep other events in memory.
pub const EVENT_WATCHES_MAX: usize = 64;
/// Client-chosen request ids remembered.
const REQUEST_IDS_MAX: usize = 4_096;

/// The one owner of state. See the module.
#[derive(Debug)]
pub struct Hub {
    state: Mutex<State>,
    writer: Writer,
    clock: Clock,
    metrics: Arc<Metrics>,
    /// Lists in use, shared by policies, their revisions and VMs.
    lists: ListCache,
    /// Packets on their way.
    captures: Captures,
}

#[derive(Debug)]
struct State {
    epoch: Epoch,
    /// Who waits for the end of a request for a forward.
    forward_waits: HashMap<PendingId, Vec<oneshot::Sender<()>>>,
    secure_mode: bool,
    fleet: Fleet,
    policies: BTreeMap<String, NamedPolicy>,
    grants: Grants,
    budgets: Budgets,
    pending: PendingTable,
    /// What is kept of VMs, by name: of those that are there, of those that are awaited, and quarantines.
    set: BTreeMap<String, StoredVm>,
    /// VMs of an earlier life that may come back.
    awaited: Option<Awaited>,
    changes: HashMap<u64, Change>,
    last_change: u64,
    last_session: u64,
    last_dataplane: u64,
    last_flow: u64,
    /// Begins anywhere, so that another start gives other ids.
    last_request: u64,
    /// Grants for once that are spent, so that the flow each let through is not cut for want of it.
    spent: VecDeque<GrantId>,
    request_ids: VecDeque<(String, v1::Grant)>,
    events: EventLog,
    repeats: Repeats,
    pending_watches: Watchers<Option<VmSelector>, v1::WatchPendingResponse>,
    vm_watches: Watchers<Option<VmSelector>, v1::WatchVmsResponse>,
    flow_watches: Watchers<Option<VmSelector>, v1::WatchFlowsResponse>,
    writes: Vec<Write>,
    metrics: Arc<Metrics>,
}

impl Hub {
    /// Takes up what the store kept. Records that no longer mean anything are left out, with a warning.
    ///
    /// # Errors
    /// [`Refusal`] if there is no randomness to be had.
    pub fn new(
        snapshot: Snapshot,
        history: History,
        writer: Writer,
        clock: Clock,
        metrics: Arc<Metrics>,
        secure_mode: bool,
    ) -> Result<Self, Refusal> {
        let now = clock.now();
        let randomness = || getrandom::u64().map_err(|e| Refusal::Unavailable(format!("no randomness: {e}")));
        let incarnation = randomness()?;
        let mut state = State {
            epoch: Epoch::first(incarnation),
            forward_waits: HashMap::new(),
            secure_mode,
            fleet: Fleet::default(),
            policies: BTreeMap::new(),
            grants: Grants::default(),
            budgets: Budgets::default(),
            pending: PendingTable::new(),
            set: snapshot.vms,
            awaited: None,
            changes: HashMap::new(),
            last_change: 0,
            last_session: 0,
            last_dataplane: 0,
            last_flow: 0,
            last_request: randomness()?,
            spent: VecDeque::new(),
            request_ids: VecDeque::new(),
            events: EventLog::new(
                history,
                Watchers::new(WATCH_QUEUE_MAX, EVENT_WATCHES_MAX, Arc::clone(&metrics)),
            ),
            repeats: Repeats::default(),
            pending_watches: Watchers::new(WATCH_QUEUE_MAX, WATCHES_MAX, Arc::clone(&metrics)),
            vm_watches: Watchers::new(WATCH_QUEUE_MAX, WATCHES_MAX, Arc::clone(&metrics)),
            flow_watches: Watchers::new(WATCH_QUEUE_MAX, WATCHES_MAX, Arc::clone(&metrics)),
            writes: Vec::new(),
            metrics: Arc::clone(&metrics),
        };
        if history.cut_off {
            tracing::warn!("the history was cut off: the controlplane before this one was killed");
            state
                .events
                .publish(now, &state.fleet, &metrics, events::cut_off());
        }
        let lists = ListCache::default();
        state.restore(
            now,
            snapshot.grants,
            snapshot.policies,
            snapshot.fallbacks,
            &lists,
        );
        Ok(Self {
            state: Mutex::new(state),
            writer,
            clock,
            metrics,
            lists,
            captures: Captures::default(),
        })
    }

    /// The counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The store's side, for reading.
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// The time.
    pub fn now(&self) -> Now {
        self.clock.now()
    }

    /// Does what time brings: expiries, lost dataplanes' ends. Call it a few times a second.
    pub fn tick(&self) {
        self.with(State::tick);
    }

    /// Ends every watch and session: the controlplane ends.
    pub fn close(&self) {
        self.captures.close();
        self.with(|state, now| {
            state.tell_repeats(now);
            state.save_spent();
            state.events.watchers.close();
            state.pending_watches.close();
            state.vm_watches.close();
            state.flow_watches.close();
            for dataplane in state.fleet.dataplanes.values_mut() {
                dataplane.link = None;
            }
        });
    }

    /// Every open request, then each change.
    ///
    /// # Errors
    /// [`Refusal::Limit`] if too many watch.
    pub fn watch_pending(
        &self,
        filter: Option<VmSelector>,
    ) -> Result<Watch<v1::WatchPendingResponse>, Refusal> {
        self.read(|state, _| {
            let response = |change: v1::PendingChange, request| v1::WatchPendingResponse {
                change: change.into(),
                request,
            };
            let mut first: Vec<_> = state
                .pending
                .open()
                .into_iter()
                .filter(|r| {
                    filter
                        .as_ref()
                        .is_none_or(|f| f.matches(&r.vm.name, &r.vm.labels))
                })
                .map(|r| response(v1::PendingChange::Added, Some(convert::request(r))))
                .collect();
            first.push(response(v1::PendingChange::Synced, None));
            state.pending_watches.add(filter, first)
        })
    }

    /// Runs `f` on the state and sends off what came of it. What is returned becomes durable with the
    /// second value.
    fn with<T>(&self, f: impl FnOnce(&mut State, Now) -> T) -> (T, Durable) {
        let now = self.clock.now();
        let mut state = self.lock();
        let result = f(&mut state, now);
        // Under the lock, so that the store sees changes in the order in which they were made.
        for event in state.events.unrecorded.drain(..) {
            self.writer.event(event);
        }
        let writes = std::mem::take(&mut state.writes);
        let durable = self.writer.write(writes);
        (result, durable)
    }

    fn read<T>(&self, f: impl FnOnce(&mut State, Now) -> T) -> T {
        self.with(f).0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside left plain data behind, each step of which is safe to go on from.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tick(&mut self, now: Now) {
        let ended = self.grants.expire(now.steady);
        if !ended.is_empty() {
            for grant in &ended {
                self.grant_ended(now, grant, "its time is over", "");
            }
            self.change(
                now,
                None,
                |vm| {
                    ended
                        .iter()
                        .any(|g| g.vms.matches(&vm.view.name, &vm.view.labels))
                },
                "a grant ended",
            );
        }
        self.tick_budgets(now);
        self.end_rules(now);
        self.end_unconfirmed(now);
        let changes = self.pending.expire(now.steady);
        self.take_up(now, changes);

        self.await_no_longer(now);
        let lost: Vec<_> = self
            .fleet
            .dataplanes
            .iter()
            .filter(|(_, d)| d.lost_at.is_some_and(|at| at + LOST_GRACE <= now.steady))
            .map(|(number, _)| *number)
            .collect();
        for number in lost {
            self.remove_dataplane(now, number);
        }
        for event in self.repeats.due(now.steady) {
            self.event(now, event);
        }
        for vm in self.fleet.vms.values_mut() {
            vm.bindings.retain(|_, binding| binding.expires_at > now.steady);
        }
    }

    fn restore(
        &mut self,
        now: Now,
        grants: Vec<crate::store::StoredGrant>,
        policies: Vec<v1::Policy>,
        fallbacks: Vec<v1::Policy>,
        lists: &ListCache,
    ) {
        let mut instances = HashSet::new();
        for stored in grants {
            let id = stored.grant.id.clone();
            let uses = stored.uses.clone();
            match convert::stored_grant(stored) {
                Ok(grant) if grant.has_ended(now.steady) => self.writes.push(Write::DeleteGrant(id)),
                Ok(grant) => {
                    instances.extend(grant.instances.iter().cloned());
                    if let Err(e) = self.grants.insert(grant) {
                        tracing::warn!(grant = id, error = %e, "stored grant left out");
                    }
                    let uses = uses.into_iter().map(|(vm, used)| (VmInstance(vm), used));
                    let id = GrantId(id);
                    self.grants.restore_uses(&id, uses);
                    self.budgets.await_flows(now.steady + LOST_GRACE, id);
                }
                Err(e) => tracing::warn!(grant = id, error = %e, "stored grant left out"),
            }
        }
        self.awaited = Awaited::new(now.steady + LOST_GRACE, instances, &self.set);
        for policy in policies {
            let name = policy.name.clone();
            let fallback = fallbacks.iter().find(|fallback| fallback.name == name);
            if let Err(e) = self.restore_policy(policy, fallback, lists) {
                tracing::error!(policy = name, error = %e, "stored policy does not load: VMs that no other policy claims are blocked until it is applied anew");
            }
        }
        // Before anybody is served under a revision whose time ran out while nothing ran.
        self.end_unconfirmed(now);
    }

    /// Tells watchers and history what happened to requests, and decides anew what they let go.
    fn take_up(&mut self, now: Now, changes: crate::approval::Changes) {
        for change in &changes.changes {
            self.publish_pending(now, change);
            if let PendingChange::Removed(id) = change {
                // Whoever waits for it sees the sender dropped.
                self.forward_waits.remove(id);
            }
        }
        for released in changes.released {
            self.decide_released(now, released);
        }
    }

    fn publish_pending(&mut self, now: Now, change: &PendingChange) {
        let (kind, id) = match change {
            PendingChange::Added(id) => (v1::PendingChange::Added, id),
            PendingChange::Updated(id) => (v1::PendingChange::Updated, id),
            PendingChange::Removed(id) => (v1::PendingChange::Removed, id),
        };
        let Some(request) = self.pending.get(id) else {
            return;
        };
        let (vm, labels) = (&request.vm.name, &request.vm.labels);
        if !self.pending_watches.is_empty() {
            let response = Arc::new(v1::WatchPendingResponse {
                change: kind.into(),
                request: Some(convert::request(request)),
            });
            self.pending_watches.publish(|filter| {
                let lets = filter.as_ref().is_none_or(|f| f.matches(vm, labels));
                lets.then(|| Arc::clone(&response))
            });
        }
        let event = match change {
            PendingChange::Added(_) => events::pending_opened(request),
            PendingChange::Removed(_) => events::pending_closed(request),
            PendingChange::Updated(_) => return,
        };
        self.events.publish(now, &self.fleet, &self.metrics, event);
    }

    fn event(&mut self, now: Now, event: v1::Event) {
        self.events.publish(now, &self.fleet, &self.metrics, event);
    }

    /// Makes an event of what a guest brings about, unless it only adds to the count of one like it.
    fn repeated_event(&mut self, now: Now, key: repeats::Key, count: u64, mut event: v1::Event) {
        // It may be told when its VM is gone.
        events::locate(&mut event, &self.fleet);
        match self.repeats.note(now.steady, key, count, event) {
            Some(event) => self.event(now, event),
            None => self.metrics.events_counted.add(count),
        }
    }

    /// Makes events of what was only counted so far.
    fn tell_repeats(&mut self, now: Now) {
        for event in self.repeats.so_far() {
            self.event(now, event);
        }
    }
}

//! The table of pending requests: open, join, hold, answer, expire, cancel, decide again.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use vnet_proto::model::{ForwardTarget, Guard, GuardSet, Name, Protocol, Reason, Subject, Target, VmId};

use crate::approval::{
    Answer, AnswerError, Answered, Ask, AskForward, AskOutcome, Asked, Change, Changes, FindError, HeldMiss,
    Limit, MissEnd, MissRef, PendingId, PendingState, Released, Request, Scope, scope,
};
use crate::grant::{GrantId, ID_PREFIX_MIN, VmInstance, VmView};

/// How long a request lives unanswered.
pub const LIFE: Duration = Duration::from_secs(600);
/// Open requests of one VM.
pub const OPEN_PER_VM_MAX: usize = 1_024;
/// Open requests of all VMs.
pub const OPEN_MAX: usize = 16_384;
/// Misses held for one VM's requests.
pub const HELD_PER_VM_MAX: usize = 8_192;
/// Names kept of one request.
pub const NAMES_PER_REQUEST_MAX: usize = 16;
/// How much longer than its hold a miss is kept here: the dataplane's clock ends it, not this one.
pub const HOLD_GRACE: Duration = Duration::from_secs(2);
/// Requests kept after their end.
pub const RECENT_MAX: usize = 1_024;
/// The time within which a policy bounds how many requests are opened.
pub const RATE_SPAN: Duration = Duration::from_secs(60);
/// Ids kept of requests that ended.
pub const RETIRED_MAX: usize = 65_536;
/// How long the beginning of a request's id stands for no other request after its end.
pub const RETIRED_FOR: Duration = Duration::from_secs(24 * 3600);

/// All pending requests: those open, and the last that ended.
#[derive(Debug, Default)]
pub struct PendingTable {
    open: BTreeMap<PendingId, Request>,
    recent: VecDeque<Request>,
    /// Ids of those that ended within [`RETIRED_FOR`], oldest first.
    retired: VecDeque<(SystemTime, PendingId)>,
    /// Until then ids are unknown that ended within [`RETIRED_FOR`], for want of room.
    forgotten_until: Option<SystemTime>,
    by_question: HashMap<Question, PendingId>,
    by_miss: HashMap<MissRef, PendingId>,
    vms: HashMap<VmInstance, VmCounts>,
    /// No later than when each open request next has something to end.
    wakes: BTreeSet<(SystemTime, PendingId)>,
}

impl PendingTable {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A miss asks: joins the open request that asks the same, or opens one. Asking again, by whatever
    /// miss, begins the request's life anew. A miss that is announced again (after a reconnect) renews
    /// its hold and is not counted twice.
    pub fn ask(&mut self, now: SystemTime, ask: Ask<'_>) -> (AskOutcome, Changes) {
        let until = now.checked_add(ask.hold).unwrap_or(now);
        let held = HeldMiss {
            miss: ask.miss,
            subject: ask.subject,
            until,
            packets: ask.packets,
        };
        let parks = ask.hold.is_zero();
        if let Some(id) = self.by_miss.get(&ask.miss).cloned().filter(|_| !parks) {
            self.hold(now, &id, held);
            return (AskOutcome::Joined(id.clone()), Changes::of(Change::Updated(id)));
        }
        let question = Question::of_miss(&ask.vm.instance, &held.subject);
        let known = self.by_question.get(&question).cloned();
        if let Some((limit, text)) = self.limit_reached(
            now,
            &ask.vm.instance,
            known.is_none(),
            true,
            ask.open_max,
            ask.per_minute_max,
        ) {
            return self.refuse(&ask.vm.instance, limit, text);
        }
        if let Some(id) = known {
            if let Some(request) = self.open.get_mut(&id) {
                request.count = request.count.saturating_add(1);
                request.last_asked_at = now;
            }
            self.hold_or_park(now, &id, held, parks);
            return (AskOutcome::Joined(id.clone()), Changes::of(Change::Updated(id)));
        }
        let id = ask.id.clone();
        let (names, guards) = evidence(&held.subject);
        let opening = Opening {
            id: ask.id,
            vm: ask.vm,
            asked: Asked::Miss(held.subject.clone()),
            peer: ask.peer,
            names,
            guards,
            reason: ask.reason,
            is_rated: ask.per_minute_max.is_some(),
        };
        self.open_request(now, question, opening);
        self.hold_or_park(now, &id, held, parks);
        (AskOutcome::Opened(id.clone()), Changes::of(Change::Added(id)))
    }

    /// A VM asks for a forward: joins the open request that asks the same, or opens one. Nothing is held here; who
    /// waits for the answer looks again when the request has ended.
    pub fn ask_forward(&mut self, now: SystemTime, ask: AskForward<'_>) -> (AskOutcome, Changes) {
        let question = Question::Forward(ask.vm.instance.clone(), ask.forward);
        let known = self.by_question.get(&question).cloned();
        if let Some((limit, text)) = self.limit_reached(
            now,
            &ask.vm.instance,
            known.is_none(),
            false,
            ask.open_max,
            ask.per_minute_max,
        ) {
            return self.refuse(&ask.vm.instance, limit, text);
        }
        let opens = known.is_none();
        let id = known.unwrap_or_else(|| ask.id.clone());
        if opens {
            let opening = Opening {
                id: ask.id,
                vm: ask.vm,
                asked: Asked::Forward(ask.forward),
                peer: String::new(),
                names: Vec::new(),
                guards: GuardSet::EMPTY,
                reason: ask.reason,
                is_rated: ask.per_minute_max.is_some(),
            };
            self.open_request(now, question, opening);
        }
        if let Some(request) = self.open.get_mut(&id) {
            if !opens {
                request.count = request.count.saturating_add(1);
                request.last_asked_at = now;
            }
            // A late yes serves the next attempt.
            request.hold_ran_out = true;
            let life = LIFE.max(ask.hold.saturating_add(HOLD_GRACE));
            let end = now.checked_add(life).unwrap_or(now);
            request.expires_at = request.expires_at.max(end);
        }
        if opens {
            (AskOutcome::Opened(id.clone()), Changes::of(Change::Added(id)))
        } else {
            (AskOutcome::Joined(id.clone()), Changes::of(Change::Updated(id)))
        }
    }

    fn refuse(&mut self, instance: &VmInstance, limit: Limit, text: String) -> (AskOutcome, Changes) {
        let count = self.vms.entry(instance.clone()).or_default().refused(limit);
        let reason = Reason::new("limit", limit.to_string(), text);
        (AskOutcome::Refused { limit, count, reason }, Changes::default())
    }

    fn open_request(&mut self, now: SystemTime, question: Question, opening: Opening<'_>) {
        let id = opening.id;
        let expires_at = now.checked_add(LIFE).unwrap_or(now);
        let request = Request {
            id: id.clone(),
            vm: opening.vm.clone(),
            asked: opening.asked,
            peer: opening.peer,
            names: opening.names.into_iter().take(NAMES_PER_REQUEST_MAX).collect(),
            guards: opening.guards,
            reason: opening.reason,
            state: PendingState::Open,
            count: 1,
            created_at: now,
            last_asked_at: now,
            expires_at,
            held: Vec::new(),
            ended_at: None,
            grant: None,
            hold_ran_out: false,
            wakes_at: expires_at,
        };
        self.wakes.insert((expires_at, id.clone()));
        self.by_question.insert(question, id.clone());
        let counts = self.vms.entry(opening.vm.instance.clone()).or_default();
        counts.open += 1;
        if opening.is_rated {
            counts.opened_at.push_back(now);
        }
        self.open.insert(id, request);
    }

    /// A miss no longer waits.
    ///
    /// A request whose guest gave up, with nothing else held and nothing ever refused for want of an
    /// answer, is cancelled. After a hold ran out it stays: a late yes serves the next attempt.
    pub fn miss_ended(&mut self, now: SystemTime, miss: MissRef, end: MissEnd) -> Changes {
        let Some(id) = self.by_miss.get(&miss).cloned() else {
            return Changes::default();
        };
        self.let_go(&id, |held| held.miss == miss);
        let Some(request) = self.open.get_mut(&id) else {
            return Changes::default();
        };
        match end {
            MissEnd::HoldExpired | MissEnd::Evicted => request.hold_ran_out = true,
            MissEnd::GuestGaveUp | MissEnd::VmDown if request.held.is_empty() && !request.hold_ran_out => {
                return self.close(now, &id, PendingState::Cancelled, None);
            }
            MissEnd::GuestGaveUp | MissEnd::VmDown | MissEnd::Covered => {}
        }
        Changes::of(Change::Updated(id))
    }

    /// A VM's link is gone for good: its requests are cancelled. Nothing is released: what they held went
    /// with the VM, and to decide it again would be to ask for a VM that is not there.
    pub fn vm_stopped(&mut self, now: SystemTime, instance: &VmInstance) -> Changes {
        let of_vm = self.open.values().filter(|r| r.vm.instance == *instance);
        let ids: Vec<PendingId> = of_vm.map(|r| r.id.clone()).collect();
        let mut changes = Changes::default();
        for id in ids {
            let closed = self.close(now, &id, PendingState::Cancelled, None);
            changes.changes.extend(closed.changes);
        }
        self.vms.remove(instance);
        changes
    }

    /// Ends requests whose life is over, and lets go of misses whose hold is; the dataplane refuses
    /// those by its own clock.
    pub fn expire(&mut self, now: SystemTime) -> Changes {
        let mut changes = Changes::default();
        while let Some((_, id)) = self.wakes.first().filter(|(at, _)| *at <= now).cloned() {
            let Some(request) = self.open.get(&id) else {
                self.wakes.pop_first();
                continue;
            };
            if request.expires_at <= now {
                changes.append(self.close(now, &id, PendingState::Expired, None));
                continue;
            }
            let before = request.held.len();
            self.let_go(&id, |held| grace_end(held) <= now);
            if let Some(request) = self.open.get_mut(&id) {
                let next = request.held.iter().map(grace_end).min();
                let wakes_at = next.map_or(request.expires_at, |end| end.min(request.expires_at));
                self.wakes.remove(&(request.wakes_at, id.clone()));
                self.wakes.insert((wakes_at, id.clone()));
                request.wakes_at = wakes_at;
                if request.held.len() < before {
                    request.hold_ran_out = true;
                    changes.changes.push(Change::Updated(id));
                }
            }
        }
        changes
    }

    /// When [`PendingTable::expire`] is next worth calling; it may then have nothing to do.
    pub fn next_expiry(&self) -> Option<SystemTime> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// What a grant that answers a request would be for; changes nothing.
    ///
    /// `scope` `None` is the narrowest. `lookup_only` keeps a name's grant from its connections.
    ///
    /// # Errors
    /// [`AnswerError`]; an etag that is given must be the request's.
    pub fn quote(
        &self,
        id: &PendingId,
        etag: Option<&str>,
        scope: Option<Scope>,
        lookup_only: bool,
    ) -> Result<Target, AnswerError> {
        let request = self.get(id).ok_or_else(|| FindError::NotFound(id.0.clone()))?;
        let id = id.clone();
        if !request.is_open() {
            return Err(AnswerError::NotOpen {
                id,
                state: request.state,
            });
        }
        if etag.is_some_and(|etag| etag != request.etag()) {
            return Err(AnswerError::Changed { id });
        }
        if lookup_only && !matches!(request.asked, Asked::Miss(Subject::Lookup(_))) {
            return Err(AnswerError::NotALookup { id });
        }
        let offered = request.scopes();
        let wanted = scope.or(offered.first().copied()).unwrap_or(Scope::HostPort);
        scope::target(request, wanted, lookup_only).ok_or_else(|| {
            let offered: Vec<String> = offered.iter().map(ToString::to_string).collect();
            AnswerError::Scope {
                id,
                scope: wanted,
                offered: offered.join(", "),
            }
        })
    }

    /// Takes an answer: the request ends, and what it held is released, to be decided under `grant`,
    /// which the caller makes for the target that [`PendingTable::quote`] gave for the same arguments.
    ///
    /// # Errors
    /// As [`PendingTable::quote`].
    #[expect(clippy::too_many_arguments, reason = "an answer has these parts")]
    pub fn answer(
        &mut self,
        now: SystemTime,
        id: &PendingId,
        etag: Option<&str>,
        answer: Answer,
        scope: Option<Scope>,
        lookup_only: bool,
        grant: GrantId,
    ) -> Result<Answered, AnswerError> {
        let target = self.quote(id, etag, scope, lookup_only)?;
        let vm = self
            .get(id)
            .ok_or_else(|| FindError::NotFound(id.0.clone()))?
            .vm
            .clone();
        let state = match answer {
            Answer::Approve => PendingState::Approved,
            Answer::Deny => PendingState::Denied,
        };
        let changes = self.close(now, id, state, Some(grant));
        Ok(Answered { target, vm, changes })
    }

    /// Policy, mode or grants changed: `still_asks` says of a VM's subject whether a person is still to
    /// be asked, and `forward_asks` of a forward. A request that is not ends as [`PendingState::Decided`]; a held miss that is not is
    /// released, to be decided again by the caller.
    pub fn decide_again(
        &mut self,
        now: SystemTime,
        mut still_asks: impl FnMut(&VmView, &Subject) -> bool,
        mut forward_asks: impl FnMut(&VmView, &ForwardTarget) -> bool,
    ) -> Changes {
        let mut changes = Changes::default();
        let ids: Vec<PendingId> = self.open.keys().cloned().collect();
        for id in ids {
            let Some(request) = self.open.get(&id) else {
                continue;
            };
            let (asks, subject) = match &request.asked {
                Asked::Miss(subject) => (still_asks(&request.vm, subject), Some(subject)),
                Asked::Forward(forward) => (forward_asks(&request.vm, forward), None),
            };
            if !asks {
                changes.append(self.close(now, &id, PendingState::Decided, None));
                continue;
            }
            let decided: BTreeSet<MissRef> = request
                .held
                .iter()
                .filter(|held| subject.is_none_or(|subject| !asks_alike(&held.subject, subject)))
                .filter(|held| !still_asks(&request.vm, &held.subject))
                .map(|held| held.miss)
                .collect();
            if !decided.is_empty() {
                let vm = request.vm.clone();
                let released = self.let_go(&id, |held| decided.contains(&held.miss));
                changes
                    .released
                    .extend(released.into_iter().map(|held| release(held, &vm, &id)));
                changes.changes.push(Change::Updated(id));
            }
        }
        changes
    }

    /// One by its id, open or lately ended.
    pub fn get(&self, id: &PendingId) -> Option<&Request> {
        self.open
            .get(id)
            .or_else(|| self.recent.iter().rev().find(|r| r.id == *id))
    }

    /// One by its id, or by a prefix of it that fits no other, open or ended within [`RETIRED_FOR`]. So
    /// what a person read off a screen never answers a question that took the place of that one since.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn find(&self, now: SystemTime, prefix: &str) -> Result<&Request, FindError> {
        let exact = PendingId(prefix.to_owned());
        if let Some(request) = self.get(&exact) {
            return Ok(request);
        }
        if prefix.len() < ID_PREFIX_MIN {
            return Err(FindError::Short(prefix.to_owned()));
        }
        if self.forgotten_until.is_some_and(|until| now < until) {
            return Err(FindError::Forgotten(prefix.to_owned()));
        }
        let open = self.open.range(exact..).map(|(id, _)| id);
        let mut fitting = open.take_while(|id| id.0.starts_with(prefix)).chain(
            self.retired
                .iter()
                .map(|(_, id)| id)
                .filter(|id| id.0.starts_with(prefix)),
        );
        let not_found = || FindError::NotFound(prefix.to_owned());
        let one = fitting.next().ok_or_else(not_found)?;
        match fitting.count() {
            0 => self.get(one).ok_or_else(not_found),
            more => Err(FindError::Ambiguous {
                prefix: prefix.to_owned(),
                count: more + 1,
            }),
        }
    }

    /// Remembers the id of a request that ended.
    fn retire(&mut self, now: SystemTime, id: PendingId) {
        self.retired.push_back((now, id));
        let gone = |at: SystemTime| at.checked_add(RETIRED_FOR).unwrap_or(at);
        while let Some((at, _)) = self.retired.front()
            && (gone(*at) <= now || self.retired.len() > RETIRED_MAX)
        {
            if gone(*at) > now {
                self.forgotten_until = Some(gone(*at));
            }
            self.retired.pop_front();
        }
    }

    /// The open requests, oldest first.
    pub fn open(&self) -> Vec<&Request> {
        let mut open: Vec<&Request> = self.open.values().collect();
        open.sort_by(|a, b| a.created_at.cmp(&b.created_at).then_with(|| a.id.cmp(&b.id)));
        open
    }

    /// How many are open.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// How many ids of ended requests are kept.
    pub fn retired_count(&self) -> usize {
        self.retired.len()
    }

    /// How many of an attachment's are open.
    pub fn open_count_of(&self, instance: &VmInstance) -> usize {
        self.vms.get(instance).map_or(0, |counts| counts.open)
    }

    /// How many of an attachment's asks were refused for a limit since it was last well below it.
    pub fn refused_count_of(&self, instance: &VmInstance) -> u64 {
        self.vms
            .get(instance)
            .map_or(0, |counts| counts.refused.iter().sum())
    }

    fn limit_reached(
        &mut self,
        now: SystemTime,
        instance: &VmInstance,
        opens: bool,
        holds: bool,
        open_max: usize,
        per_minute_max: Option<usize>,
    ) -> Option<(Limit, String)> {
        let (open, held) = self
            .vms
            .get(instance)
            .map_or((0, 0), |counts| (counts.open, counts.held));
        if opens && open >= OPEN_PER_VM_MAX {
            let text = format!("{OPEN_PER_VM_MAX} requests of this VM await an answer; answer some first");
            return Some((Limit::OpenPerVm, text));
        }
        if opens && open >= open_max {
            let text = format!(
                "{open_max} requests of this VM await an answer (approvals.maxPendingPerVm); answer some first"
            );
            return Some((Limit::OpenPerVm, text));
        }
        if let (true, Some(most)) = (opens, per_minute_max.map(|most| most.min(OPEN_PER_VM_MAX)))
            && let Some(counts) = self.vms.get_mut(instance)
        {
            let over = |at: &SystemTime| at.checked_add(RATE_SPAN).is_none_or(|end| end <= now);
            while counts.opened_at.front().is_some_and(over) {
                counts.opened_at.pop_front();
            }
            if counts.opened_at.len() >= most {
                let text = format!(
                    "this VM opened {most} requests within a minute (approvals.maxRequestsPerMinute); wait, or \
                     answer more with one answer"
                );
                return Some((Limit::Rate, text));
            }
        }
        if opens && self.open.len() >= OPEN_MAX {
            let text = format!("{OPEN_MAX} requests of all VMs await an answer; answer some first");
            return Some((Limit::Open, text));
        }
        if holds && held >= HELD_PER_VM_MAX {
            let text = format!("{HELD_PER_VM_MAX} flows and lookups of this VM are held for an answer");
            return Some((Limit::HeldPerVm, text));
        }
        None
    }

    fn hold_or_park(&mut self, now: SystemTime, id: &PendingId, held: HeldMiss, parks: bool) {
        if !parks {
            return self.hold(now, id, held);
        }
        // One that was held before policy said otherwise waits no more.
        self.let_go(id, |known| known.miss == held.miss);
        if let Some(request) = self.open.get_mut(id) {
            request.hold_ran_out = true;
            let life = now.checked_add(LIFE).unwrap_or(now);
            request.expires_at = request.expires_at.max(life);
        }
    }

    /// Holds a miss for an open request, or renews its hold, and renews the request's life.
    fn hold(&mut self, now: SystemTime, id: &PendingId, held: HeldMiss) {
        let Some(request) = self.open.get_mut(id) else {
            return;
        };
        let end = grace_end(&held);
        let life = now.checked_add(LIFE).unwrap_or(now);
        request.expires_at = request.expires_at.max(life).max(end);
        let wakes_at = request.wakes_at.min(end);
        if wakes_at != request.wakes_at {
            self.wakes.remove(&(request.wakes_at, id.clone()));
            self.wakes.insert((wakes_at, id.clone()));
            request.wakes_at = wakes_at;
        }
        if self.by_miss.insert(held.miss, id.clone()).is_some() {
            if let Some(known) = request.held.iter_mut().find(|h| h.miss == held.miss) {
                *known = held;
            }
        } else {
            request.held.push(held);
            self.vms.entry(request.vm.instance.clone()).or_default().held += 1;
        }
    }

    /// Takes misses from an open request.
    fn let_go(&mut self, id: &PendingId, which: impl Fn(&HeldMiss) -> bool) -> Vec<HeldMiss> {
        let Some(request) = self.open.get_mut(id) else {
            return Vec::new();
        };
        let gone: Vec<HeldMiss> = request.held.extract_if(.., |held| which(held)).collect();
        for held in &gone {
            self.by_miss.remove(&held.miss);
        }
        if let Some(counts) = self.vms.get_mut(&request.vm.instance) {
            counts.held = counts.held.saturating_sub(gone.len());
            counts.forget_refusals();
        }
        gone
    }

    /// Ends an open request and releases what it held.
    fn close(
        &mut self,
        now: SystemTime,
        id: &PendingId,
        state: PendingState,
        grant: Option<GrantId>,
    ) -> Changes {
        let held = self.let_go(id, |_| true);
        let Some(mut request) = self.open.remove(id) else {
            return Changes::default();
        };
        self.wakes.remove(&(request.wakes_at, id.clone()));
        self.by_question
            .remove(&Question::of(&request.vm.instance, &request.asked));
        if let Some(counts) = self.vms.get_mut(&request.vm.instance) {
            counts.open = counts.open.saturating_sub(1);
            counts.forget_refusals();
        }
        let released = held
            .into_iter()
            .map(|held| release(held, &request.vm, id))
            .collect();
        request.state = state;
        request.grant = grant;
        request.ended_at = Some(now);
        if self.recent.len() >= RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(request);
        self.retire(now, id.clone());
        Changes {
            changes: vec![Change::Removed(id.clone())],
            released,
        }
    }
}

/// A request that is to be opened.
struct Opening<'a> {
    id: PendingId,
    vm: &'a VmView,
    asked: Asked,
    peer: String,
    names: Vec<Name>,
    guards: GuardSet,
    reason: Reason,
    /// The policy bounds how many are opened within [`RATE_SPAN`].
    is_rated: bool,
}

/// What makes two misses one question. All that an answer reaches follows from it, so that what is
/// asked under an id stays what was shown.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Question {
    /// The name that the guest meant, on a port, whichever of its addresses was picked.
    NamedFlow(VmInstance, Protocol, Name, u16),
    /// One address and port, what is dialled for it, the guards that it is under, and the guest that has
    /// it.
    Flow(VmInstance, Protocol, SocketAddr, IpAddr, GuardSet, Option<VmId>),
    /// A name, whatever the record type: the A/AAAA pair is one question.
    Lookup(VmInstance, Name),
    /// A forward.
    Forward(VmInstance, ForwardTarget),
}

impl Question {
    fn of(instance: &VmInstance, asked: &Asked) -> Self {
        match asked {
            Asked::Miss(subject) => Self::of_miss(instance, subject),
            Asked::Forward(forward) => Self::Forward(instance.clone(), *forward),
        }
    }

    fn of_miss(instance: &VmInstance, subject: &Subject) -> Self {
        let instance = instance.clone();
        match subject {
            Subject::Lookup(lookup) => Self::Lookup(instance, lookup.name.clone()),
            Subject::Flow(flow) => {
                let (protocol, peer) = (flow.key.protocol, flow.key.peer);
                match flow.names.first() {
                    Some(name)
                        if flow.guards.without(Guard::Synthetic).is_empty() && protocol.has_ports() =>
                    {
                        Self::NamedFlow(instance, protocol, name.clone(), peer.port())
                    }
                    _ => Self::Flow(instance, protocol, peer, flow.dialled, flow.guards, flow.peer_vm),
                }
            }
        }
    }
}

/// What is counted of one attachment.
#[derive(Debug, Default)]
struct VmCounts {
    open: usize,
    held: usize,
    refused: [u64; 4],
    /// When its last requests were opened, where the policy bounds how many may be within [`RATE_SPAN`].
    opened_at: VecDeque<SystemTime>,
}

impl VmCounts {
    fn refused(&mut self, limit: Limit) -> u64 {
        let count = &mut self.refused[limit as usize];
        *count = count.saturating_add(1);
        *count
    }

    /// Well below its limits a VM starts afresh. Not just below, so that a guest which hovers at the
    /// limit makes no event of each refusal.
    fn forget_refusals(&mut self) {
        if self.open < OPEN_PER_VM_MAX / 2 && self.held < HELD_PER_VM_MAX / 2 {
            self.refused = [0; 4];
        }
    }
}

fn evidence(subject: &Subject) -> (Vec<Name>, GuardSet) {
    match subject {
        Subject::Flow(flow) => (flow.names.clone(), flow.guards),
        Subject::Lookup(lookup) => (vec![lookup.name.clone()], GuardSet::EMPTY),
    }
}

/// Whether two subjects are decided alike: they differ at most in the guest's own port or record type.
fn asks_alike(a: &Subject, b: &Subject) -> bool {
    match (a, b) {
        (Subject::Flow(a), Subject::Flow(b)) => {
            a.key.protocol == b.key.protocol
                && a.key.peer == b.key.peer
                && a.dialled == b.dialled
                && a.names == b.names
                && a.guards == b.guards
                && a.peer_vm == b.peer_vm
        }
        (Subject::Lookup(a), Subject::Lookup(b)) => a.name == b.name,
        (Subject::Flow(_), Subject::Lookup(_)) | (Subject::Lookup(_), Subject::Flow(_)) => false,
    }
}

fn grace_end(held: &HeldMiss) -> SystemTime {
    held.until.checked_add(HOLD_GRACE).unwrap_or(held.until)
}

fn release(held: HeldMiss, vm: &VmView, request: &PendingId) -> Released {
    Released {
        miss: held.miss,
        vm: vm.clone(),
        subject: held.subject,
        until: held.until,
        packets: held.packets,
        request: request.clone(),
    }
}

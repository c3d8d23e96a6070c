//! Grants: a person's runtime answers, as plain data, and the table of those in force.
//!
//! The table holds at most [`GRANTS_MAX`] grants. Storing them is `store`'s, making ids and telling the
//! time is the caller's. What a grant means for a flow or a lookup is [`crate::policy`]'s to say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{Budget, Target, VmSelector};

use crate::policy::{FlowTest, NameSet, ProtocolSet};

/// Grants in force at one time, all VMs together.
pub const GRANTS_MAX: usize = 65_536;

/// How long a [`Lifetime::Once`] grant may lie unused.
pub const ONCE_UNUSED_MAX: Duration = Duration::from_secs(60);

/// Characters of an id that may stand for the whole.
pub const ID_PREFIX_MIN: usize = 4;

/// A grant's id, unique for ever.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId(pub String);

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One attachment of a VM: the same while its link lives, another once it has stopped. The fleet
/// makes it, of the dataplane's boot id and the VM's handle for instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmInstance(pub String);

/// What decisions read of a VM. All of it comes from the host's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// This attachment of it.
    pub instance: VmInstance,
}

/// What a grant does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GrantAction {
    /// Lets through what no rule denies.
    Allow,
    /// Refuses, before any rule.
    Deny,
}

impl fmt::Display for GrantAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// How long a grant holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lifetime {
    /// One flow, or one lookup of either family and the flow that follows it; void after
    /// [`ONCE_UNUSED_MAX`].
    Once,
    /// From its creation.
    For(Duration),
    /// Until each VM that it applied to has stopped.
    UntilVmStops,
    /// Until revoked.
    Forever,
}

impl Lifetime {
    /// When a grant made `now` ends by itself; `None`: not by time.
    pub fn expires_at(self, now: SystemTime) -> Option<SystemTime> {
        match self {
            Self::Once => now.checked_add(ONCE_UNUSED_MAX),
            // A span that time itself does not reach never ends.
            Self::For(span) => now.checked_add(span),
            Self::UntilVmStops | Self::Forever => None,
        }
    }
}

/// A runtime allow or deny.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Its id.
    pub id: GrantId,
    /// What it does.
    pub action: GrantAction,
    /// What it is for.
    pub target: Target,
    /// Which VMs it is for.
    pub vms: VmSelector,
    /// How long it holds.
    pub lifetime: Lifetime,
    /// Limits; zero fields are none.
    pub budget: Budget,
    /// What has been used of them.
    pub used: Budget,
    /// When it was made.
    pub created_at: SystemTime,
    /// When it ends by itself.
    pub expires_at: Option<SystemTime>,
    /// Who made it.
    pub creator: String,
    /// Why, in its maker's words.
    pub reason: String,
    /// Verdicts that rested on it.
    pub hits: u64,
    /// When it was last used.
    pub last_hit_at: Option<SystemTime>,
    /// The pending request that it answered; empty for none.
    pub pending_id: String,
    /// Under [`Lifetime::UntilVmStops`]: the attachments that it is bound to. Others it does not reach.
    pub instances: BTreeSet<VmInstance>,
}

impl Grant {
    /// A grant as it is made: unused, and with its end worked out. Under [`Lifetime::UntilVmStops`]
    /// the caller binds it to the attachments that `vms` selects now.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a fact that nothing else here knows"
    )]
    pub fn new(
        id: GrantId,
        action: GrantAction,
        target: Target,
        vms: VmSelector,
        lifetime: Lifetime,
        budget: Budget,
        creator: String,
        now: SystemTime,
    ) -> Self {
        Self {
            id,
            action,
            target,
            vms,
            lifetime,
            budget,
            used: Budget::default(),
            created_at: now,
            expires_at: lifetime.expires_at(now),
            creator,
            reason: String::new(),
            hits: 0,
            last_hit_at: None,
            pending_id: String::new(),
            instances: BTreeSet::new(),
        }
    }

    /// Whether it reaches a VM.
    pub fn reaches(&self, vm: &VmView) -> bool {
        self.vms.matches(&vm.name, &vm.labels)
            && (self.lifetime != Lifetime::UntilVmStops || self.instances.contains(&vm.instance))
    }

    /// Whether it has ended by `now`, by time or by budget.
    pub fn has_ended(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|end| end <= now) || self.is_used_up()
    }

    /// Whether a limit of its budget is used up.
    pub fn is_used_up(&self) -> bool {
        let up = |limit: u64, used: u64| limit != 0 && used >= limit;
        up(self.budget.connections, self.used.connections)
            || up(self.budget.bytes_up, self.used.bytes_up)
            || up(self.budget.bytes_down, self.used.bytes_down)
    }

    /// What is left of its budget; `None` when it has none. Zero fields still mean no such limit: a
    /// grant with a limit at zero has ended.
    pub fn budget_left(&self) -> Option<Budget> {
        (self.budget != Budget::default()).then(|| Budget {
            connections: self.budget.connections.saturating_sub(self.used.connections),
            bytes_up: self.budget.bytes_up.saturating_sub(self.used.bytes_up),
            bytes_down: self.budget.bytes_down.saturating_sub(self.used.bytes_down),
        })
    }
}

/// Why a grant was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// The table is full.
    #[error("{GRANTS_MAX} grants are in force, which is the limit; revoke some first")]
    Full,
    /// The id is taken.
    #[error("grant {0} already exists")]
    Exists(GrantId),
    /// A prefix that is too short to mean one.
    #[error(
        "{0:?} is too short for the beginning of a grant's id (expected at least {ID_PREFIX_MIN} characters); \
         list them with: vnetctl grants list"
    )]
    Short(String),
    /// No grant has this id or prefix.
    #[error("no grant has an id that begins with {0:?}; list them with: vnetctl grants list")]
    NotFound(String),
    /// Several grants have ids that begin so.
    #[error("{count} grants have ids that begin with {prefix:?}; give more of the id")]
    Ambiguous {
        /// What was given.
        prefix: String,
        /// How many fit.
        count: usize,
    },
}

/// What was used of a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// A flow was let through (or, of a deny, refused).
    Flow,
    /// A lookup was. It does not use up a [`Lifetime::Once`] grant: the A/AAAA pair and the
    /// connection that follows are one intent.
    Lookup,
}

/// The grants in force.
#[derive(Debug, Default)]
pub struct Grants {
    by_id: BTreeMap<GrantId, Arc<Grant>>,
    generation: u64,
}

impl Grants {
    /// Raised by every change that can alter a decision; a [`VmGrants`] made under another is stale.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Adds one.
    ///
    /// # Errors
    /// [`GrantError::Full`] at [`GRANTS_MAX`], [`GrantError::Exists`] for an id that is there.
    pub fn insert(&mut self, grant: Grant) -> Result<Arc<Grant>, GrantError> {
        if self.by_id.contains_key(&grant.id) {
            return Err(GrantError::Exists(grant.id));
        }
        if self.by_id.len() >= GRANTS_MAX {
            return Err(GrantError::Full);
        }
        self.generation += 1;
        let grant = Arc::new(grant);
        self.by_id.insert(grant.id.clone(), Arc::clone(&grant));
        Ok(grant)
    }

    /// Ends one.
    pub fn remove(&mut self, id: &GrantId) -> Option<Arc<Grant>> {
        let grant = self.by_id.remove(id)?;
        self.generation += 1;
        Some(grant)
    }

    /// Removes and returns what has ended by `now`.
    pub fn expire(&mut self, now: SystemTime) -> Vec<Arc<Grant>> {
        self.remove_where(|grant| grant.has_ended(now))
    }

    /// A VM's link is gone for good: what was bound to it alone ends, and is returned.
    pub fn vm_stopped(&mut self, instance: &VmInstance) -> Vec<Arc<Grant>> {
        for grant in self.by_id.values_mut().filter(|g| g.instances.contains(instance)) {
            Arc::make_mut(grant).instances.remove(instance);
            self.generation += 1;
        }
        self.remove_where(|g| g.lifetime == Lifetime::UntilVmStops && g.instances.is_empty())
    }

    /// Records a use. Returns the grant if that was its last (it is then no longer in force).
    pub fn record_use(&mut self, id: &GrantId, what: Use, now: SystemTime) -> Option<Arc<Grant>> {
        let grant = Arc::make_mut(self.by_id.get_mut(id)?);
        grant.hits = grant.hits.saturating_add(1);
        grant.last_hit_at = Some(now);
        if what == Use::Flow && grant.action == GrantAction::Allow {
            grant.used.connections = grant.used.connections.saturating_add(1);
            if grant.budget.connections != 0 {
                self.generation += 1;
            }
        }
        let spent = what == Use::Flow && grant.lifetime == Lifetime::Once;
        if spent || grant.is_used_up() {
            self.remove(id)
        } else {
            None
        }
    }

    /// Counts bytes against a grant's budget. Returns the grant if that used it up (it is then no
    /// longer in force).
    pub fn record_bytes(&mut self, id: &GrantId, up: u64, down: u64) -> Option<Arc<Grant>> {
        let grant = Arc::make_mut(self.by_id.get_mut(id)?);
        grant.used.bytes_up = grant.used.bytes_up.saturating_add(up);
        grant.used.bytes_down = grant.used.bytes_down.saturating_add(down);
        if grant.budget.bytes_up != 0 || grant.budget.bytes_down != 0 {
            self.generation += 1;
        }
        if grant.is_used_up() { self.remove(id) } else { None }
    }

    /// The next instant at which one ends by time.
    pub fn next_expiry(&self) -> Option<SystemTime> {
        self.by_id.values().filter_map(|g| g.expires_at).min()
    }

    /// One by its id.
    pub fn get(&self, id: &GrantId) -> Option<&Arc<Grant>> {
        self.by_id.get(id)
    }

    /// One by its id or a prefix of it that fits it only.
    ///
    /// # Errors
    /// [`GrantError::Short`], [`GrantError::NotFound`] and [`GrantError::Ambiguous`].
    pub fn find(&self, prefix: &str) -> Result<&Arc<Grant>, GrantError> {
        let exact = GrantId(prefix.to_owned());
        if let Some(grant) = self.by_id.get(&exact) {
            return Ok(grant);
        }
        if prefix.len() < ID_PREFIX_MIN {
            return Err(GrantError::Short(prefix.to_owned()));
        }
        let mut fitting = self
            .by_id
            .range(exact..)
            .take_while(|(id, _)| id.0.starts_with(prefix));
        match (fitting.next(), fitting.count()) {
            (Some((_, grant)), 0) => Ok(grant),
            (Some(_), more) => Err(GrantError::Ambiguous {
                prefix: prefix.to_owned(),
                count: more + 1,
            }),
            (None, _) => Err(GrantError::NotFound(prefix.to_owned())),
        }
    }

    /// All of them, newest first.
    pub fn newest_first(&self) -> Vec<&Arc<Grant>> {
        let mut grants: Vec<_> = self.by_id.values().collect();
        grants.sort_by(|a, b| b.created_at.cmp(&a.created_at).then_with(|| a.id.cmp(&b.id)));
        grants
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Those that reach a VM, ready for decisions. Keep it while [`Grants::generation`] stands.
    pub fn for_vm(&self, vm: &VmView) -> VmGrants {
        VmGrants::new(
            self.by_id.values().filter(|g| g.reaches(vm)).cloned(),
            self.generation,
        )
    }

    fn remove_where(&mut self, ends: impl Fn(&Grant) -> bool) -> Vec<Arc<Grant>> {
        let mut ended = Vec::new();
        self.by_id.retain(|_, grant| {
            let ends = ends(grant);
            if ends {
                ended.push(Arc::clone(grant));
            }
            !ends
        });
        self.generation += u64::from(!ended.is_empty());
        ended
    }
}

/// The grants that reach one VM, ready for decisions.
#[derive(Debug, Clone, Default)]
pub struct VmGrants {
    pub(crate) deny: Vec<ReadyGrant>,
    pub(crate) allow: Vec<ReadyGrant>,
    generation: u64,
}

impl VmGrants {
    /// From grants that all reach the VM.
    pub fn new(grants: impl IntoIterator<Item = Arc<Grant>>, generation: u64) -> Self {
        let (mut allow, deny): (Vec<_>, Vec<_>) = grants
            .into_iter()
            .map(ReadyGrant::new)
            .partition(|ready| ready.grant.action == GrantAction::Allow);
        // Of several that allow, the one that limits least and lasts longest is used first, so that
        // a "once" is not spent where it was not needed.
        allow.sort_by_key(|ready| {
            let grant = &ready.grant;
            let ends = grant.expires_at.map(std::cmp::Reverse);
            (
                grant.lifetime == Lifetime::Once,
                grant.budget != Budget::default(),
                ends.is_some(),
                ends,
            )
        });
        Self {
            deny,
            allow,
            generation,
        }
    }

    /// The [`Grants::generation`] that it was made under.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// A grant with its target made into a test.
#[derive(Debug, Clone)]
pub(crate) struct ReadyGrant {
    pub(crate) grant: Arc<Grant>,
    pub(crate) test: FlowTest,
    /// Whether lookups are its business: never for a deny of some ports only.
    pub(crate) lookups: bool,
    /// Whether connections are.
    pub(crate) flows: bool,
}

impl ReadyGrant {
    pub(crate) fn new(grant: Arc<Grant>) -> Self {
        let unset = match grant.action {
            GrantAction::Allow => ProtocolSet::TCP_UDP,
            GrantAction::Deny => ProtocolSet::ALL,
        };
        let ported = |ports: Option<_>| {
            if ports.is_some() {
                ProtocolSet::TCP_UDP
            } else {
                unset
            }
        };
        let (test, lookups, flows) = match &grant.target {
            Target::Address {
                protocol,
                prefix,
                ports,
            } => {
                let protocols = match protocol {
                    Some(protocol) => ProtocolSet::one(*protocol),
                    None => ported(*ports),
                };
                let test = FlowTest {
                    protocols,
                    prefixes: vec![*prefix],
                    ports: ports.iter().copied().collect(),
                    names: None,
                };
                (test, false, true)
            }
            Target::Name {
                pattern,
                ports,
                lookup_only,
            } => {
                let test = FlowTest {
                    protocols: ported(*ports),
                    prefixes: Vec::new(),
                    ports: ports.iter().copied().collect(),
                    names: Some(Arc::new(NameSet::from_iter([pattern.clone()]))),
                };
                // No answer about one port is an answer about the name; a yes to a port needs the lookup.
                let lookups = grant.action == GrantAction::Allow || ports.is_none();
                (test, lookups, !lookup_only)
            }
        };
        Self {
            grant,
            test,
            lookups,
            flows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn vm(name: &str) -> VmView {
        VmView {
            name: name.into(),
            labels: BTreeMap::new(),
            instance: VmInstance(format!("boot/{name}")),
        }
    }

    fn grant(id: &str, lifetime: Lifetime) -> Grant {
        let target = "tcp 1.2.3.4:443".parse().unwrap();
        let (allow, all) = (GrantAction::Allow, VmSelector::all());
        Grant::new(
            GrantId(id.into()),
            allow,
            target,
            all,
            lifetime,
            Budget::default(),
            "ann".into(),
            at(0),
        )
    }

    #[test]
    fn a_grant_ends_at_its_time_and_not_before() {
        let mut grants = Grants::default();
        grants
            .insert(grant("a", Lifetime::For(Duration::from_secs(60))))
            .unwrap();
        grants.insert(grant("b", Lifetime::Forever)).unwrap();
        assert_eq!(grants.next_expiry(), Some(at(60)));
        assert!(grants.expire(at(59)).is_empty());
        let generation = grants.generation();
        assert_eq!(grants.expire(at(60))[0].id, GrantId("a".into()));
        assert!(grants.generation() > generation);
        assert_eq!((grants.len(), grants.next_expiry()), (1, None));
        assert!(Lifetime::For(Duration::MAX).expires_at(at(0)).is_none());
    }

    #[test]
    fn once_is_one_flow_and_the_lookups_before_it_and_void_after_a_minute() {
        let mut grants = Grants::default();
        grants.insert(grant("a", Lifetime::Once)).unwrap();
        let id = GrantId("a".into());
        assert!(grants.record_use(&id, Use::Lookup, at(1)).is_none());
        assert!(grants.record_use(&id, Use::Lookup, at(1)).is_none());
        assert_eq!(grants.record_use(&id, Use::Flow, at(2)).unwrap().hits, 3);
        assert!(grants.is_empty() && grants.record_use(&id, Use::Flow, at(2)).is_none());
        grants.insert(grant("b", Lifetime::Once)).unwrap();
        assert_eq!(grants.expire(at(60)).len(), 1);
    }

    #[test]
    fn until_the_vm_stops_is_that_attachment_and_no_other() {
        let mut grants = Grants::default();
        let instances = BTreeSet::from([vm("a").instance, vm("b").instance]);
        grants
            .insert(Grant {
                instances,
                ..grant("g", Lifetime::UntilVmStops)
            })
            .unwrap();
        let again = VmView {
            instance: VmInstance("boot2/a".into()),
            ..vm("a")
        };
        assert_eq!(grants.for_vm(&vm("a")).allow.len(), 1);
        assert_eq!(grants.for_vm(&again).allow.len(), 0);
        assert!(grants.vm_stopped(&vm("a").instance).is_empty());
        assert_eq!(grants.for_vm(&vm("a")).allow.len(), 0);
        assert_eq!(grants.for_vm(&vm("b")).allow.len(), 1);
        assert_eq!(grants.vm_stopped(&vm("b").instance).len(), 1);
    }

    #[test]
    fn a_budget_that_is_used_up_ends_its_grant() {
        let mut grants = Grants::default();
        let budget = Budget {
            connections: 2,
            bytes_up: 100,
            bytes_down: 0,
        };
        let id = GrantId("g".into());
        grants
            .insert(Grant {
                budget,
                ..grant("g", Lifetime::Forever)
            })
            .unwrap();
        assert!(grants.record_use(&id, Use::Flow, at(1)).is_none());
        assert_eq!(grants.get(&id).unwrap().budget_left().unwrap().connections, 1);
        assert!(grants.record_bytes(&id, 99, 1 << 40).is_none());
        let generation = grants.generation();
        assert!(grants.record_bytes(&id, 1, 0).is_some());
        assert!(grants.is_empty() && grants.generation() > generation);
        assert!(grant("x", Lifetime::Forever).budget_left().is_none());
    }

    #[test]
    fn grants_are_capped_and_ids_are_unique() {
        let mut grants = Grants::default();
        for n in 0..GRANTS_MAX {
            grants
                .insert(grant(&format!("gran{n}"), Lifetime::Forever))
                .unwrap();
        }
        assert_eq!(
            grants.insert(grant("more", Lifetime::Forever)),
            Err(GrantError::Full)
        );
        let taken = GrantId("gran0".into());
        assert_eq!(
            grants.insert(grant("gran0", Lifetime::Forever)),
            Err(GrantError::Exists(taken))
        );
        assert!(matches!(
            grants.find("gran"),
            Err(GrantError::Ambiguous {
                count: GRANTS_MAX,
                ..
            })
        ));
        assert_eq!(grants.find("gran0").unwrap().id.0, "gran0");
        assert_eq!(grants.find("gran65535").unwrap().id.0, "gran65535");
        assert!(matches!(grants.find("grand"), Err(GrantError::NotFound(_))));
    }

    #[test]
    fn an_id_may_be_cut_to_four_characters_and_no_fewer() {
        let mut grants = Grants::default();
        grants.insert(grant("abcdefgh", Lifetime::Forever)).unwrap();
        assert_eq!(grants.find("abcd").unwrap().id.0, "abcdefgh");
        for short in ["", "a", "abc"] {
            assert_eq!(grants.find(short), Err(GrantError::Short(short.to_owned())));
        }
    }
}

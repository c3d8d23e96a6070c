//! Grants: a person's runtime answers, as plain data, and the table of those in force.
//!
//! The table holds at most [`GRANTS_MAX`] grants, and an account of each that has a budget. Storing them is
//! `store`'s, making ids and telling the time is the caller's. What a grant means for a flow or a lookup is [`crate::policy`]'s to say.

mod account;
mod ready;
mod spending;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{Budget, Target, VmSelector};

pub use account::{Account, VMS_PER_ACCOUNT_MAX};
pub(crate) use ready::ReadyGrant;
pub use ready::VmGrants;
pub use spending::{RESERVATIONS_MAX, RESERVED_MAX, Reservation, Spending};

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
    /// What had been used of them when it was taken up. What is used since is in its account
    /// ([`Grants::account`]).
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

    /// Whether it has ended by `now`, by time.
    pub fn has_ended(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// What was left of its budget when it was taken up; `None` when it has none.
    pub fn budget_left(&self) -> Option<Budget> {
        (self.budget != Budget::default()).then(|| self.budget.minus(self.used))
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
    accounts: BTreeMap<GrantId, Account>,
    reservations: HashMap<Reservation, (GrantId, SystemTime)>,
    /// Accounts of grants that have ended, for the VMs that are to be told.
    closed: Vec<(GrantId, Vec<VmInstance>)>,
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
        if grant.budget != Budget::default() {
            self.accounts
                .insert(grant.id.clone(), Account::new(grant.budget, grant.used));
        }
        let grant = Arc::new(grant);
        self.by_id.insert(grant.id.clone(), Arc::clone(&grant));
        Ok(grant)
    }

    /// Ends one.
    pub fn remove(&mut self, id: &GrantId) -> Option<Arc<Grant>> {
        let grant = self.by_id.remove(id)?;
        self.generation += 1;
        self.close_account(id);
        Some(grant)
    }

    /// Removes and returns what has ended by `now`.
    pub fn expire(&mut self, now: SystemTime) -> Vec<Arc<Grant>> {
        self.remove_where(|grant| grant.has_ended(now))
    }

    /// A VM's link is gone for good: what was bound to it alone ends, and is returned.
    pub fn vm_stopped(&mut self, instance: &VmInstance) -> Vec<Arc<Grant>> {
        let is_last = |g: &Grant| g.instances.iter().all(|one| one == instance);
        let ended = self.remove_where(|g| g.lifetime == Lifetime::UntilVmStops && is_last(g));
        for grant in self.by_id.values_mut().filter(|g| g.instances.contains(instance)) {
            Arc::make_mut(grant).instances.remove(instance);
            self.generation += 1;
        }
        ended
    }

    /// Records a use. Returns the grant if that was its last (it is then no longer in force).
    pub fn record_use(&mut self, id: &GrantId, what: Use, now: SystemTime) -> Option<Arc<Grant>> {
        let grant = Arc::make_mut(self.by_id.get_mut(id)?);
        grant.hits = grant.hits.saturating_add(1);
        grant.last_hit_at = Some(now);
        let spent = what == Use::Flow && grant.lifetime == Lifetime::Once;
        if spent { self.remove(id) } else { None }
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
        let reaching = self.by_id.values().filter(|g| g.reaches(vm));
        VmGrants::new(
            reaching.filter(|g| !self.is_closed(&g.id)).cloned(),
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
        for grant in &ended {
            self.close_account(&grant.id);
        }
        ended
    }
}

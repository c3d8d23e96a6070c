//! What is used of grants with budgets: counted, set aside, and used up.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vnet_proto::model::{Allowance, Budget, MissId};

use super::{Account, Grant, GrantId, Grants, VmInstance};

/// Connections set aside for verdicts of which nothing is known yet.
pub const RESERVATIONS_MAX: usize = 65_536;

/// How long a connection is set aside for a verdict.
pub const RESERVED_MAX: Duration = Duration::from_secs(60);

/// Names one verdict that sets a connection aside: the caller's number of a dataplane, and the miss.
pub type Reservation = (u64, MissId);

/// What a VM's report of its use came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spending {
    /// No such grant has a budget.
    Unknown,
    /// Nothing changed.
    Nothing,
    /// It counts.
    Counted,
    /// It counts, and that was the last connection: no other flow is let through.
    LastConnection(Arc<Grant>),
    /// A limit of bytes is reached: the grant is no longer in force.
    UsedUp(Arc<Grant>),
}

impl Grants {
    /// What is used of a grant that has a budget.
    pub fn account(&self, id: &GrantId) -> Option<&Account> {
        self.accounts.get(id)
    }

    /// What a VM may use of a grant that has a budget.
    pub fn allowance(&mut self, id: &GrantId, vm: &VmInstance) -> Option<Allowance> {
        Some(self.accounts.get_mut(id)?.allowance(vm.clone()))
    }

    /// What VMs had told before a restart; it is part of what is used already.
    pub fn restore_uses(&mut self, id: &GrantId, uses: impl IntoIterator<Item = (VmInstance, Budget)>) {
        if let Some(account) = self.accounts.get_mut(id) {
            for (vm, used) in uses {
                account.restore(vm, used);
            }
        }
    }

    /// A VM tells what it has used of a grant in all.
    pub fn record_spending(&mut self, id: &GrantId, vm: VmInstance, used: Budget) -> Spending {
        let Some(account) = self.accounts.get_mut(id) else {
            return Spending::Unknown;
        };
        let was_out = account.is_out_of_connections();
        if !account.tell(vm, used) {
            return Spending::Nothing;
        }
        let (out_of_bytes, out) = (account.is_out_of_bytes(), account.is_out_of_connections());
        if out_of_bytes {
            return self.remove(id).map_or(Spending::Unknown, Spending::UsedUp);
        }
        if out && !was_out {
            self.generation += 1;
            let grant = self.by_id.get(id).cloned();
            return grant.map_or(Spending::Unknown, Spending::LastConnection);
        }
        Spending::Counted
    }

    /// Sets a connection aside for a verdict. False where the limit of reservations is reached.
    pub fn reserve(&mut self, id: &GrantId, verdict: Reservation, now: SystemTime) -> bool {
        // A miss that is answered again is one connection still.
        self.release(verdict);
        if self.reservations.len() >= RESERVATIONS_MAX {
            return false;
        }
        let Some(account) = self.accounts.get_mut(id) else {
            return false;
        };
        account.reserve();
        if !account.is_open() {
            self.generation += 1;
        }
        self.reservations.insert(verdict, (id.clone(), now));
        true
    }

    /// It is known what came of a verdict: its connection is counted, or did not open.
    pub fn release(&mut self, verdict: Reservation) {
        let Some((id, _)) = self.reservations.remove(&verdict) else {
            return;
        };
        let Some(account) = self.accounts.get_mut(&id) else {
            return;
        };
        let was_open = account.is_open();
        account.release();
        if !was_open && account.is_open() {
            self.generation += 1;
        }
    }

    /// Gives up what nothing has been heard of for too long.
    pub fn expire_reservations(&mut self, now: SystemTime) {
        let over = |since: &SystemTime| since.checked_add(RESERVED_MAX).is_some_and(|end| end <= now);
        let gone: Vec<Reservation> = self
            .reservations
            .iter()
            .filter(|(_, (_, since))| over(since))
            .map(|(verdict, _)| *verdict)
            .collect();
        for verdict in gone {
            self.release(verdict);
        }
    }

    /// Grants whose connections have all opened, and are known to have.
    pub fn out_of_connections(&self) -> Vec<GrantId> {
        self.accounts
            .iter()
            .filter(|(_, account)| account.is_out_of_connections() && !account.has_reserved())
            .map(|(id, _)| id.clone())
            .collect()
    }

    /// Whether a grant lets no further flow through, and has not ended.
    pub fn is_closed(&self, id: &GrantId) -> bool {
        self.accounts.get(id).is_some_and(|account| !account.is_open())
    }

    /// Grants with budgets that ended since the last call, with the VMs that used them.
    pub fn take_closed(&mut self) -> Vec<(GrantId, Vec<VmInstance>)> {
        std::mem::take(&mut self.closed)
    }

    pub(super) fn close_account(&mut self, id: &GrantId) {
        let Some(account) = self.accounts.remove(id) else {
            return;
        };
        if account.has_reserved() {
            self.reservations.retain(|_, (of, _)| of != id);
        }
        let vms: Vec<VmInstance> = account.vms().map(|(vm, _)| vm.clone()).collect();
        if !vms.is_empty() {
            self.closed.push((id.clone(), vms));
        }
    }
}

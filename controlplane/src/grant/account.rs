//! Budgets: what VMs have used of a grant that has one, what is left, and what each VM may still use.
//!
//! A budget belongs to the grant as a whole. Each VM tells what it has used in all since it attached, so that a
//! report that is lost or comes twice makes no difference; what all of them used is kept here. A connection is
//! reserved with the verdict that lets it through and counted when its VM tells that it opened, so that two VMs
//! that ask at once do not share the last one.
//!
//! Plain data; when a grant ends for it is [`super::Grants`]' to say, and telling VMs is the hub's.

use std::collections::BTreeMap;

use vnet_proto::model::{Allowance, Budget};

use super::VmInstance;

/// VMs of which one account knows what they used. Beyond it the one that was heard of longest ago is forgotten;
/// what it used stays counted, and would be counted again if it were heard of again.
pub const VMS_PER_ACCOUNT_MAX: usize = 8_192;

/// What is used of one grant's budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    budget: Budget,
    used: Budget,
    vms: BTreeMap<VmInstance, Told>,
    reserved: u64,
    heard: u64,
}

/// What one VM has told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Told {
    used: Budget,
    /// Grows with each report.
    heard: u64,
}

impl Account {
    /// Of a budget of which so much is used already.
    pub fn new(budget: Budget, used: Budget) -> Self {
        Self {
            budget,
            used,
            vms: BTreeMap::new(),
            reserved: 0,
            heard: 0,
        }
    }

    /// Takes up what a VM had told before a restart; it is part of what is used.
    pub fn restore(&mut self, vm: VmInstance, used: Budget) {
        self.vm(vm).used = used;
    }

    /// What all VMs used.
    pub fn used(&self) -> Budget {
        self.used
    }

    /// VMs that use it, and what each has told.
    pub fn vms(&self) -> impl Iterator<Item = (&VmInstance, Budget)> {
        self.vms.iter().map(|(vm, told)| (vm, told.used))
    }

    /// How many.
    pub fn vm_count(&self) -> usize {
        self.vms.len()
    }

    /// A VM tells what it has used in all. False where that is nothing new.
    pub fn tell(&mut self, vm: VmInstance, used: Budget) -> bool {
        let told = self.vm(vm);
        // A sum only grows: what is less is old.
        let more = used.minus(told.used);
        told.used = told.used.plus(more);
        self.used = self.used.plus(more);
        more != Budget::default()
    }

    /// What a VM may use. It is among those that are told when that changes from now on.
    pub fn allowance(&mut self, vm: VmInstance) -> Allowance {
        let left = |limit: u64, used: u64| if limit == 0 { 0 } else { limit.saturating_sub(used) };
        let (budget, all) = (self.budget, self.used);
        Allowance {
            left: Budget {
                connections: left(budget.connections, all.connections),
                bytes_up: left(budget.bytes_up, all.bytes_up),
                bytes_down: left(budget.bytes_down, all.bytes_down),
            },
            used: self.vm(vm).used,
        }
    }

    /// Whether connections are limited.
    pub fn limits_connections(&self) -> bool {
        self.budget.connections != 0
    }

    /// Whether bytes are.
    pub fn limits_bytes(&self) -> bool {
        self.budget.limits_bytes()
    }

    /// Whether one more connection may open.
    pub fn is_open(&self) -> bool {
        !self.limits_connections()
            || self.used.connections.saturating_add(self.reserved) < self.budget.connections
    }

    /// Whether all connections have opened.
    pub fn is_out_of_connections(&self) -> bool {
        self.limits_connections() && self.used.connections >= self.budget.connections
    }

    /// Whether a limit of bytes is reached.
    pub fn is_out_of_bytes(&self) -> bool {
        let out = |limit: u64, used: u64| limit != 0 && used >= limit;
        out(self.budget.bytes_up, self.used.bytes_up) || out(self.budget.bytes_down, self.used.bytes_down)
    }

    /// Sets a connection aside for a verdict.
    pub(crate) fn reserve(&mut self) {
        self.reserved = self.reserved.saturating_add(1);
    }

    /// Gives one back, because it was counted or did not open.
    pub(crate) fn release(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Whether a verdict is out of which it is not yet known what came.
    pub(crate) fn has_reserved(&self) -> bool {
        self.reserved > 0
    }

    fn vm(&mut self, vm: VmInstance) -> &mut Told {
        if !self.vms.contains_key(&vm)
            && self.vms.len() >= VMS_PER_ACCOUNT_MAX
            && let Some(longest_ago) = self.vms.iter().min_by_key(|(_, told)| told.heard)
        {
            let longest_ago = longest_ago.0.clone();
            self.vms.remove(&longest_ago);
        }
        self.heard += 1;
        let told = self.vms.entry(vm).or_default();
        told.heard = self.heard;
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(n: usize) -> VmInstance {
        VmInstance(format!("boot/{n}"))
    }

    fn budget(connections: u64, bytes_up: u64, bytes_down: u64) -> Budget {
        Budget {
            connections,
            bytes_up,
            bytes_down,
        }
    }

    #[test]
    fn uses_of_all_vms_are_added_up_and_a_report_that_comes_twice_is_not() {
        let mut account = Account::new(budget(0, 1000, 0), budget(0, 100, 7));
        assert!(account.tell(vm(1), budget(1, 200, 5)));
        assert!(!account.tell(vm(1), budget(1, 200, 5)));
        assert!(!account.tell(vm(1), budget(0, 150, 5)), "an old one");
        assert!(account.tell(vm(2), budget(1, 300, 0)));
        assert_eq!(account.used(), budget(2, 600, 12));
        assert!(!account.is_out_of_bytes());
        assert!(account.tell(vm(1), budget(1, 600, 5)));
        assert!(account.is_out_of_bytes() && account.is_open());
    }

    #[test]
    fn a_vm_may_use_what_others_have_left() {
        let mut account = Account::new(budget(0, 1000, 0), Budget::default());
        assert_eq!(account.allowance(vm(1)).limit(), budget(0, 1000, 0));
        account.tell(vm(1), budget(0, 200, 0));
        // What it uses meanwhile counts, whether this is told or not.
        assert_eq!(account.allowance(vm(1)).limit(), budget(0, 1000, 0));
        account.tell(vm(2), budget(0, 300, 0));
        assert_eq!(account.allowance(vm(1)).limit(), budget(0, 700, 0));
        assert_eq!(account.allowance(vm(2)).limit(), budget(0, 800, 0));
        assert_eq!(account.allowance(vm(3)).limit(), budget(0, 500, 0));
    }

    #[test]
    fn the_last_connection_is_not_shared_and_one_that_did_not_open_is_free_again() {
        let mut account = Account::new(budget(2, 0, 0), Budget::default());
        account.reserve();
        assert!(account.is_open());
        account.reserve();
        assert!(!account.is_open() && !account.is_out_of_connections());
        account.release();
        assert!(account.is_open(), "its guest gave up");
        account.tell(vm(1), budget(1, 0, 0));
        account.release();
        assert!(account.is_open() && !account.has_reserved());
        account.tell(vm(1), budget(2, 0, 0));
        assert!(!account.is_open() && account.is_out_of_connections());
    }

    #[test]
    fn so_many_vms_are_known_and_what_the_others_used_stays_counted() {
        let mut account = Account::new(budget(0, u64::MAX, 0), Budget::default());
        for n in 0..VMS_PER_ACCOUNT_MAX + 3 {
            account.tell(vm(n), budget(0, 10, 0));
        }
        assert_eq!(account.vm_count(), VMS_PER_ACCOUNT_MAX);
        assert_eq!(account.used().bytes_up, 10 * (VMS_PER_ACCOUNT_MAX as u64 + 3));
        assert!(
            !account.tell(vm(3), budget(0, 10, 0)),
            "those heard of last are known"
        );
        assert!(account.tell(vm(0), budget(0, 10, 0)), "the first is forgotten");
    }
}

//! The fleet: which dataplanes and VMs exist, which session serves each, and their live flows.
//!
//! Plain data with its limits; deciding and telling are the hub's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use tokio::sync::{mpsc, oneshot};
use vnet_proto::model::{CommandId, Epoch, FlowId, FlowSubject, Mode, Name, Reason, Subject, VmId};
use vnet_proto::v1;

use crate::grant::{VmGrants, VmInstance, VmView};
use crate::policy::{Effective, GuardedRanges, OwnPolicy};
use crate::refusal::Refusal;
use crate::store::StoredVm;

/// Dataplanes, lost ones included.
pub const DATAPLANES_MAX: usize = 1_024;
/// VMs, lost ones included.
pub const VMS_MAX: usize = 8_192;
/// Live flows of one dataplane. One more is cut: what is not known cannot be revoked.
pub const FLOWS_PER_DATAPLANE_MAX: usize = 262_144;
/// Bindings of one VM; beyond it the one that ends first goes.
pub const BINDINGS_PER_VM_MAX: usize = 4_096;
/// Denied names remembered of one VM; beyond it the one that is longest ago goes.
pub const DENIED_PER_VM_MAX: usize = 1_024;
/// Destinations of one dataplane's guests that are dialled at other addresses.
pub const NAT_MAX: usize = 256;
/// Addresses that one dataplane has closed to guests.
pub const CLOSED_MAX: usize = 64;
/// Commands that a dataplane has not acknowledged.
pub const OUTSTANDING_MAX: usize = 16_384;
/// How long a lost dataplane's VMs are kept.
pub const LOST_GRACE: Duration = Duration::from_secs(60);
/// How long a VM's name may be.
pub const VM_NAME_BYTES_MAX: usize = 128;
/// How long a lookup is held when the VM does not say.
pub const LOOKUP_HOLD: Duration = Duration::from_secs(4);

/// A dataplane's number, the same while its process lives.
pub type DataplaneNo = u64;

/// Everything that is attached.
#[derive(Debug, Default)]
pub struct Fleet {
    /// Dataplanes.
    pub dataplanes: BTreeMap<DataplaneNo, Dataplane>,
    /// VMs, by name.
    pub vms: BTreeMap<String, Vm>,
}

/// One dataplane process.
#[derive(Debug)]
pub struct Dataplane {
    /// Its name.
    pub name: String,
    /// Random for each start of its process.
    pub boot_id: Vec<u8>,
    /// Its process ([`crate::process::mark`]); empty where that was not told.
    pub process: String,
    /// Its network's name.
    pub network: String,
    /// Its session; `None`: lost.
    pub link: Option<Link>,
    /// When its session was lost.
    pub lost_at: Option<SystemTime>,
    /// The epoch in force there.
    pub epoch: Epoch,
    /// The guests' subnets, one of a family at most.
    pub subnets: Vec<IpNet>,
    /// The gateway's address there.
    pub gateway: Option<IpAddr>,
    /// Destinations of its guests that are dialled at other addresses.
    pub nat: HashMap<IpAddr, IpAddr>,
    /// Where it listens over TCP, and who started it: closed to the guests of every dataplane.
    pub closed: BTreeSet<SocketAddr>,
    /// It hears of what the others have closed after its Welcome, too.
    pub hears_closed: bool,
    /// What it guards.
    pub guarded: GuardedRanges,
    /// Its VMs' names, by handle.
    pub vms: HashMap<VmId, String>,
    /// Its live flows.
    pub flows: HashMap<FlowId, LiveFlow>,
    /// Its forwards.
    pub forwards: Vec<v1::Forward>,
    /// Its zones, in order of precedence.
    pub zones: Vec<v1::Zone>,
    /// What it has not acknowledged.
    pub outstanding: HashMap<CommandId, Outstanding>,
    /// The last command's id.
    pub last_command: u64,
}

/// A connected session.
#[derive(Debug)]
pub struct Link {
    /// Which: a message of another session is stale.
    pub session: u64,
    /// Messages to it.
    pub outbox: mpsc::Sender<v1::SessionResponse>,
    /// Ends it.
    pub end: Option<oneshot::Sender<tonic::Status>>,
}

/// What a dataplane has not acknowledged.
#[derive(Debug)]
pub enum Outstanding {
    /// A Revoke or Cut, perhaps of a change that somebody waits for.
    Change(Option<u64>),
    /// A command that somebody waits for.
    Command {
        /// Which.
        command: v1::command::Command,
        /// Who waits.
        reply: oneshot::Sender<Result<v1::Ack, Refusal>>,
        /// The change that it is part of, and that somebody waits for.
        change: Option<u64>,
    },
}

/// One live flow.
#[derive(Debug, Clone)]
pub struct LiveFlow {
    /// Its id in the API.
    pub id: String,
    /// Grows with each flow.
    pub number: u64,
    /// The VM's name.
    pub vm: String,
    /// Opened from the host's side.
    pub ingress: bool,
    /// What it is.
    pub subject: FlowSubject,
    /// The VM that it is for; empty where that is none.
    pub peer: String,
    /// The names that it might speak when it opened; empty where none was demanded.
    pub names: Vec<Name>,
    /// The grant that it rests on; empty for none.
    pub grant: String,
    /// That grant was for once, and is spent on it.
    pub once: bool,
    /// Why it was let through.
    pub reason: Reason,
    /// Observe mode let it through.
    pub would_deny: bool,
    /// When it opened.
    pub opened_at: SystemTime,
    /// Bytes from the guest.
    pub bytes_up: u64,
    /// Bytes to the guest.
    pub bytes_down: u64,
}

/// What a lookup taught.
#[derive(Debug, Clone)]
pub struct Binding {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// When it ends.
    pub expires_at: SystemTime,
}

/// A name that was denied.
#[derive(Debug, Clone)]
pub struct Denied {
    /// How often.
    pub count: u64,
    /// When last, on the wall clock.
    pub last_at: SystemTime,
    /// Why.
    pub reason: Reason,
}

/// One guest link.
#[derive(Debug)]
pub struct Vm {
    /// What decisions read of it.
    pub view: VmView,
    /// Its handle.
    pub handle: VmId,
    /// Its dataplane.
    pub dataplane: DataplaneNo,
    /// Whether its link is there.
    pub attached: bool,
    /// Its dataplane's session is lost.
    pub lost: bool,
    /// Labels from the host's side, before what was set.
    pub host_labels: BTreeMap<String, String>,
    /// What is kept of it, as what was set at run time.
    pub set: StoredVm,
    /// The policy that it brought.
    pub own_policy: Option<Arc<OwnPolicy>>,
    /// The mode that it brought.
    pub own_mode: Option<Mode>,
    /// It brought `--ec2-metadata-access`.
    pub ec2_metadata_access: bool,
    /// What it is under.
    pub effective: Arc<Effective>,
    /// The grants that reach it.
    pub grants: VmGrants,
    /// How its guest is attached.
    pub transport: String,
    /// How long its lookups may be held.
    pub lookup_hold: Duration,
    /// When it attached.
    pub attached_at: Option<SystemTime>,
    /// Addresses bound to its link.
    pub addresses: Vec<String>,
    /// Its MAC address, as it claims.
    pub mac: String,
    /// Its DHCP host name, as it claims.
    pub claimed_hostname: String,
    /// The address that DHCP gave to it; empty for none.
    pub leased_address: String,
    /// What failed of its link, once it is gone; empty where that was simply closed.
    pub link_error: String,
    /// Frames not delivered, by reason.
    pub dropped_frames: BTreeMap<String, u64>,
    /// What else its dataplane counts of it, by name.
    pub counters: BTreeMap<String, u64>,
    /// How many flows are live.
    pub live_flows: u64,
    /// What its lookups taught.
    pub bindings: BTreeMap<Name, Binding>,
    /// What its lookups were denied, by name and record type.
    pub denied: BTreeMap<(Name, u16), Denied>,
}

impl Fleet {
    /// Dataplanes by the part of attachments ([`VmInstance`]) that is theirs; see [`place`].
    pub fn places(&self) -> HashMap<String, DataplaneNo> {
        let dataplanes = self.dataplanes.iter();
        dataplanes
            .map(|(number, d)| (boot(&d.boot_id), *number))
            .collect()
    }

    /// The VM of a dataplane's handle.
    pub fn vm_of(&self, dataplane: DataplaneNo, handle: VmId) -> Option<&Vm> {
        self.vms.get(self.dataplanes.get(&dataplane)?.vms.get(&handle)?)
    }

    /// The other guest that a subject of a dataplane is for, if it is there.
    pub fn peer_of(&self, dataplane: DataplaneNo, subject: &Subject) -> Option<&Vm> {
        match subject {
            Subject::Flow(flow) => self.vm_of(dataplane, flow.peer_vm?),
            Subject::Lookup(_) => None,
        }
    }

    /// A VM by its name.
    ///
    /// # Errors
    /// [`Refusal::NotFound`].
    pub fn vm(&self, name: &str) -> Result<&Vm, Refusal> {
        self.vms.get(name).ok_or_else(|| no_vm(name))
    }

    /// The network that a VM is on.
    pub fn network_of(&self, vm: &str) -> Option<&str> {
        let dataplane = self.dataplanes.get(&self.vms.get(vm)?.dataplane)?;
        Some(&dataplane.network)
    }

    /// The VMs that are on a network.
    pub fn on_network<'a>(&'a self, network: &'a str) -> impl Iterator<Item = &'a Vm> {
        self.dataplanes
            .values()
            .filter(move |dataplane| dataplane.network == network)
            .flat_map(|dataplane| dataplane.vms.values())
            .filter_map(|name| self.vms.get(name))
    }

    /// The dataplane of a network; without a name, the only one.
    ///
    /// # Errors
    /// [`Refusal`] if there is none, or no name is given where there are several.
    pub fn dataplane_of_network(&self, network: &str) -> Result<DataplaneNo, Refusal> {
        let mut fitting: Vec<(&DataplaneNo, &Dataplane)> = self
            .dataplanes
            .iter()
            .filter(|(_, d)| d.link.is_some() && (network.is_empty() || d.network == network))
            .collect();
        match (fitting.pop(), fitting.is_empty()) {
            (Some((number, _)), true) => Ok(*number),
            (Some((_, last)), false) => {
                let names: BTreeSet<&str> = fitting
                    .iter()
                    .map(|(_, d)| d.network.as_str())
                    .chain([last.network.as_str()])
                    .collect();
                let names: Vec<&str> = names.into_iter().collect();
                Err(Refusal::Ambiguous(format!(
                    "several networks fit; name one of: {}",
                    names.join(", ")
                )))
            }
            (None, _) if network.is_empty() => {
                Err(Refusal::Unavailable("no dataplane is connected".to_owned()))
            }
            (None, _) => Err(Refusal::NotFound(format!(
                "no connected dataplane has a network {network:?}"
            ))),
        }
    }
}

/// There is no VM of this name.
pub fn no_vm(name: &str) -> Refusal {
    Refusal::NotFound(format!(
        "there is no VM {name:?}; list them with: vnetctl vm list"
    ))
}

/// The wanted name, or if it is taken the first of NAME-2, NAME-3 and so on that is not. An empty name stays empty.
pub fn numbered(wanted: &str, taken: impl Fn(&str) -> bool) -> String {
    if wanted.is_empty() || !taken(wanted) {
        return wanted.to_owned();
    }
    // Ends: fewer names are taken than there are numbers.
    (2u64..)
        .map(|n| format!("{wanted}-{n}"))
        .find(|name| !taken(name))
        .unwrap_or_else(|| wanted.to_owned())
}

impl Vm {
    /// Its state, as the API says it.
    pub fn state(&self) -> v1::VmState {
        match (self.lost, self.attached) {
            (true, _) => v1::VmState::Lost,
            (false, true) => v1::VmState::Attached,
            (false, false) => v1::VmState::Detached,
        }
    }

    /// Names bound to an address, those that last longest first.
    pub fn names_of(&self, address: IpAddr) -> Vec<Name> {
        let mut bound: Vec<(&Name, &Binding)> = self
            .bindings
            .iter()
            .filter(|(_, b)| b.addresses.contains(&address))
            .collect();
        bound.sort_by_key(|(_, binding)| std::cmp::Reverse(binding.expires_at));
        bound.into_iter().map(|(name, _)| name.clone()).collect()
    }

    /// Records a binding.
    pub fn bind(&mut self, name: Name, binding: Binding) {
        if !self.bindings.contains_key(&name)
            && self.bindings.len() >= BINDINGS_PER_VM_MAX
            && let Some(first) = self
                .bindings
                .iter()
                .min_by_key(|(_, b)| b.expires_at)
                .map(|(n, _)| n.clone())
        {
            self.bindings.remove(&first);
        }
        self.bindings.insert(name, binding);
    }

    /// Records a denied lookup.
    pub fn deny(&mut self, name: Name, query_type: u16, reason: Reason, count: u64, wall: SystemTime) {
        let key = (name, query_type);
        if !self.denied.contains_key(&key)
            && self.denied.len() >= DENIED_PER_VM_MAX
            && let Some(oldest) = self
                .denied
                .iter()
                .min_by_key(|(_, d)| d.last_at)
                .map(|(k, _)| k.clone())
        {
            self.denied.remove(&oldest);
        }
        let denied = self.denied.entry(key).or_insert(Denied {
            count: 0,
            last_at: wall,
            reason: Reason::default(),
        });
        denied.count = denied.count.saturating_add(count);
        denied.last_at = wall;
        denied.reason = reason;
    }

    /// Its labels: the host's, with what was set on top.
    pub fn merged_labels(host: &BTreeMap<String, String>, set: &StoredVm) -> BTreeMap<String, String> {
        let mut labels = host.clone();
        labels.extend(set.labels.clone());
        labels.retain(|_, value| !value.is_empty());
        labels
    }
}

/// This attachment of a VM, unlike every other.
pub fn instance(boot_id: &[u8], handle: VmId) -> VmInstance {
    VmInstance(format!("{}/{handle}", boot(boot_id)))
}

fn boot(boot_id: &[u8]) -> String {
    boot_id.iter().map(|b| format!("{b:02x}")).collect()
}

/// Where an attachment is: its dataplane, if that is known, and its handle there.
pub fn place(places: &HashMap<String, DataplaneNo>, instance: &VmInstance) -> Option<(DataplaneNo, VmId)> {
    let (boot, handle) = instance.0.split_once('/')?;
    Some((*places.get(boot)?, VmId(handle.parse().ok()?)))
}

/// Checks a VM's name: it stands in selectors, tables and file names.
///
/// # Errors
/// One sentence.
pub fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '@' | '+');
    if name.is_empty() {
        Err("a VM has no name; give it one with --vm".to_owned())
    } else if name.len() > VM_NAME_BYTES_MAX {
        Err(format!(
            "VM name of {} bytes is too long (at most {VM_NAME_BYTES_MAX})",
            name.len()
        ))
    } else if !name.chars().all(good) {
        Err(format!(
            "VM name {name:?} has a character other than letters, digits and . _ - : @ +"
        ))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(check_name("web-1.example").is_ok());
        for bad in [
            "",
            "a b",
            "a*",
            "a,b",
            "a=b",
            "a\u{1b}[0m",
            &"x".repeat(VM_NAME_BYTES_MAX + 1),
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_attachment_leads_to_its_dataplane() {
        let places = HashMap::from([(boot(&[0xab; 16]), 7)]);
        assert_eq!(
            place(&places, &instance(&[0xab; 16], VmId(3))),
            Some((7, VmId(3)))
        );
        assert_eq!(place(&places, &instance(&[0xac; 16], VmId(3))), None);
        assert_eq!(place(&places, &VmInstance("nonsense".to_owned())), None);
    }

    #[test]
    fn set_labels_stand_over_the_hosts_and_an_empty_one_removes() {
        let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let set = StoredVm {
            labels: labels(&[("b", "x"), ("c", "")]),
            ..StoredVm::default()
        };
        let merged = Vm::merged_labels(&labels(&[("a", "1"), ("b", "2"), ("c", "3")]), &set);
        assert_eq!(merged, labels(&[("a", "1"), ("b", "x")]));
    }
}

//! What guests of one network share, off the fast path: leases, zones, guards, the switch's inboxes,
//! and who is there.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender as InputSender;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::thread;
use std::time::{Duration, SystemTime};

use ipnet::Ipv4Net;
use mio::Waker;
use tokio::sync::mpsc::Sender;
use vnet_proto::model::{GuardSet, Protocol, VmId};

use crate::capture::{
    CAPTURES_PER_GUEST_MAX, CAPTURES_PER_NETWORK_MAX, Capture, CaptureSpec, INTERFACES_MAX, Tap,
};
use crate::causes::WithCauses;
use crate::claims::Claims;
use crate::clock;
use crate::descriptors::Descriptors;
use crate::driver::{Ask, Driver, DriverParts};
use crate::egress::resolver::Resolver;
use crate::egress::resolver::host::ResolvConf;
use crate::egress::way;
use crate::engine::discovery::Ipv6Config;
use crate::engine::frame::DropReason;
use crate::engine::gateway::dhcp::{self, DhcpConfig, DhcpOutcome};
use crate::engine::gateway::dns::zones::{ZoneError, Zones};
use crate::engine::nat::{Nat, may_be_a_guests};
use crate::engine::switch::{Neighbour, Passed};
use crate::engine::{Engine, EngineConfig, Surroundings, Time};
use crate::forward::Forwards;
use crate::front::FrontSender;
use crate::guards::Guards;
use crate::inbox::Inbox;
use crate::leases::{LeaseCounts, Leases};
use crate::link::serve::Berth;
use crate::link::{Link, LinkError};
use crate::mac::Mac;
use crate::message::{Input, Order, OwnPolicy, Report, Router, VmUp};
use crate::metrics::{LeaseRefusal, LinkRefusal, Metrics, ResolverFault};
use crate::session;
use crate::zone::{Zone, ZoneRecord};

/// What a network is made with.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// The guests' subnet.
    pub subnet: Ipv4Net,
    /// Addresses that the gateway stands for beside its own.
    pub nat: Arc<Nat>,
    /// IPv6, unless it carries none.
    pub ipv6: Option<Ipv6Config>,
    /// Largest IP packet towards a guest, bytes.
    pub mtu_bytes: usize,
    /// What the DHCP server hands out.
    pub dhcp: DhcpConfig,
    /// The host's resolver settings, whose search domains are handed out rather than the configured ones.
    pub follow_search: Option<Arc<Mutex<ResolvConf>>>,
    /// How long a flow is held before a controlplane has said otherwise.
    pub hold: Duration,
    /// How long a guest whose hypervisor closed its socket is kept, where it can come back.
    pub grace: Duration,
    /// Flows of one guest at once.
    pub flows_max: usize,
    /// The host's descriptors, which guests share.
    pub descriptors: Descriptors,
    /// Where what guests share is counted.
    pub metrics: Arc<Metrics>,
}

/// How a guest attaches.
#[derive(Debug, Clone, Default)]
pub struct GuestSpec {
    /// The name it should go by.
    pub name: String,
    /// Labels, from the host's side.
    pub labels: std::collections::BTreeMap<String, String>,
    /// The policy it brings along.
    pub own_policy: Option<OwnPolicy>,
    /// The mode it brings along.
    pub mode: Option<vnet_proto::model::Mode>,
    /// Whether 169.254.0.0/16 is open to it.
    pub ec2_metadata_access: bool,
    /// How long its resolver waits.
    pub resolver_patience: Duration,
    /// The only MAC address it may have.
    pub pinned_mac: Option<Mac>,
    /// The address that is kept for it.
    pub pinned_address: Option<Ipv4Addr>,
    /// No MAC address that a lease is kept for may be its own: it came by a socket that not only hypervisors reach,
    /// and they have others.
    pub without_kept: bool,
}

/// One network and its guests.
pub struct Network {
    config: NetworkConfig,
    leases: Mutex<Leases>,
    claims: Mutex<Claims>,
    zones: RwLock<Arc<Zones>>,
    /// Held while the next zones are made of these.
    zones_change: Mutex<()>,
    guards: Arc<Guards>,
    resolver: Resolver,
    runtime: tokio::runtime::Handle,
    guests: RwLock<Guests>,
    reports: Sender<Report>,
    forwards: std::sync::OnceLock<Forwards>,
    front: std::sync::OnceLock<FrontSender>,
    capture_file: std::sync::OnceLock<Arc<Capture>>,
    /// Captures of one guest each.
    captures: Mutex<Vec<(VmId, Weak<Capture>)>>,
}

#[derive(Default)]
struct Guests {
    by_vm: HashMap<VmId, Guest>,
    by_mac: HashMap<Mac, VmId>,
    next: u32,
    /// No more are let in.
    stopped: bool,
}

struct Guest {
    /// Unbounded: what comes in are answers to the guest's own misses and queries, which are bounded, as are
    /// connections that wait for it, the sockets of forwards, each of which it has once, the ends of its flows with
    /// other guests, of which each has one, captures, links that come and are tried, of a few at a time, the word to
    /// make way, which it is given once, questions for addresses, a few a second for each of the few that are sought,
    /// and orders, none of which may be lost.
    inputs: InputSender<Input>,
    waker: Arc<Waker>,
    inbox: Arc<Inbox>,
    switch_open: AtomicBool,
    /// That it uses an address which it cannot have was told.
    told_of_address: AtomicBool,
    /// That it uses a MAC address which it cannot have was told.
    told_of_mac: AtomicBool,
    /// No MAC address that a lease is kept for may be its own.
    without_kept: bool,
    /// As it attached.
    name: String,
}

impl Network {
    /// A network without guests.
    pub fn new(
        config: NetworkConfig,
        leases: Leases,
        zones: Zones,
        guards: Arc<Guards>,
        resolver: Resolver,
        runtime: tokio::runtime::Handle,
        reports: Sender<Report>,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            leases: Mutex::new(leases),
            claims: Mutex::default(),
            zones: RwLock::new(Arc::new(zones)),
            zones_change: Mutex::new(()),
            guards,
            resolver,
            runtime,
            guests: RwLock::default(),
            reports,
            forwards: std::sync::OnceLock::new(),
            front: std::sync::OnceLock::new(),
            capture_file: std::sync::OnceLock::new(),
            captures: Mutex::default(),
        })
    }

    /// Where forwards learn that a guest has an address now. Once.
    pub fn set_forwards(&self, forwards: Forwards) {
        // A second call would be a mistake at start; the first stays.
        let _ = self.forwards.set(forwards);
    }

    /// Captures guests that attach from now on, all of them and for as long as they are there. Once.
    pub fn capture_all(&self, capture: Arc<Capture>) {
        // As above.
        let _ = self.capture_file.set(capture);
    }

    /// Offers guests that attach from now on the gateway's port 80, which this front serves. Once.
    pub fn offer_guest_api(&self, front: FrontSender) {
        // As above.
        let _ = self.front.set(front);
    }

    /// Who serves the gateway's port 80, if anybody does.
    pub(crate) fn front(&self) -> Option<&FrontSender> {
        self.front.get()
    }

    /// Where what is of no one guest is counted.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.config.metrics
    }

    /// How long a guest whose link is gone is kept.
    pub(crate) fn grace(&self) -> Duration {
        self.config.grace
    }

    /// Whether a guest that is there has this MAC address.
    pub(crate) fn has_station(&self, mac: Mac) -> bool {
        self.read_guests().by_mac.contains_key(&mac)
    }

    /// The gateway's hardware address, and its IPv4 address.
    pub(crate) fn gateway(&self) -> (Mac, Ipv4Addr) {
        (self.config.gateway_mac, self.config.gateway)
    }

    /// The IPv4 addresses of these guests, with their hardware addresses.
    pub(crate) fn addresses_of(&self, vms: &[VmId]) -> Vec<(Ipv4Addr, Mac)> {
        if vms.is_empty() {
            return Vec::new();
        }
        let vms: HashSet<VmId> = vms.iter().copied().collect();
        let leases = self.lock_leases();
        let own = leases.in_use().filter(|(_, _, vm)| vms.contains(vm));
        own.map(|(address, mac, _)| (address, mac)).collect()
    }

    /// Whether a guest is under neither policy nor mode, so that all others reach it. Not known yet is no.
    pub(crate) fn is_switch_open(&self, vm: VmId) -> bool {
        let guests = self.read_guests();
        let guest = guests.by_vm.get(&vm);
        guest.is_some_and(|guest| guest.switch_open.load(Ordering::Relaxed))
    }

    /// Whether guests were told to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.read_guests().stopped
    }

    /// Time since the process started, counting time suspended.
    pub fn now(&self) -> Time {
        clock::now()
    }

    /// Starts a guest on a link, in a thread of its own. The thread ends with the link and says
    /// why.
    ///
    /// # Errors
    /// The system's: no thread, no poller.
    pub fn attach(self: &Arc<Self>, link: Link, spec: GuestSpec) -> io::Result<thread::JoinHandle<()>> {
        self.attach_then(link, spec, None, || {})
    }

    /// As [`Self::attach`]. With a `berth`, a guest whose hypervisor closes the link is kept for a while, and may
    /// come back over another. `then` is called when the guest is gone.
    ///
    /// # Errors
    /// The system's: no thread, no poller; and when guests were told to end.
    pub fn attach_then(
        self: &Arc<Self>,
        link: Link,
        spec: GuestSpec,
        berth: Option<Berth>,
        then: impl FnOnce() + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let vm = {
            let mut guests = self.write_guests();
            guests.next += 1;
            VmId(guests.next)
        };
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| io::Error::other(error.to_string()))?;
        let config = EngineConfig {
            vm,
            gateway: self.config.gateway,
            gateway_mac: self.config.gateway_mac,
            subnet: self.config.subnet,
            nat: Arc::clone(&self.config.nat),
            ipv6: self.config.ipv6.clone(),
            mtu_bytes: self.config.mtu_bytes,
            pinned_mac: spec.pinned_mac,
            flows_max: self.config.flows_max,
            descriptors: self.config.descriptors.attach(vm)?,
            hold: self.config.hold,
            lookup_hold: spec.resolver_patience,
            seed,
        };
        let mut engine = Engine::new(
            config,
            Arc::clone(self) as Arc<dyn Surroundings>,
            spec.name.clone(),
        );
        if self.front().is_some() {
            engine.offer_guest_api();
        }
        let transport = link.transport();
        let inbox = Arc::new(Inbox::default());
        let (inputs, receiver) = std::sync::mpsc::channel();
        let (driver, waker) = Driver::new(DriverParts {
            vm,
            link,
            engine,
            inputs: receiver,
            inbox: Arc::clone(&inbox),
            berth,
            reports: self.reports.clone(),
            network: Arc::clone(self),
            tap: self.tap_of_file(&spec.name),
            resolver: self.resolve_for(vm),
        })?;
        if let Some(address) = spec.pinned_address
            && !self.lock_leases().pin(vm, spec.pinned_mac, address)
        {
            tracing::warn!(vm = %spec.name, %address, "the address is not free; the VM is given another");
        }
        let guest = Guest {
            inputs,
            waker,
            inbox,
            switch_open: AtomicBool::new(false),
            told_of_address: AtomicBool::new(false),
            told_of_mac: AtomicBool::new(false),
            without_kept: spec.without_kept,
            name: spec.name.clone(),
        };
        {
            let mut guests = self.write_guests();
            if guests.stopped {
                return Err(io::Error::other("the dataplane is ending"));
            }
            guests.by_vm.insert(vm, guest);
        }
        let name = spec.name.clone();
        let up = VmUp {
            vm,
            name: spec.name,
            labels: spec.labels,
            transport,
            own_policy: spec.own_policy,
            mode: spec.mode,
            ec2_metadata_access: spec.ec2_metadata_access,
            resolver_patience: spec.resolver_patience,
            attached_at: SystemTime::now(),
        };
        let network = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(format!("guest-{vm}"))
            .spawn(move || {
                tracing::info!(vm = %name, transport, "guest attached");
                let _ = network.reports.blocking_send(Report::VmUp(up));
                // A bug that a guest finds is contained in its own thread: it loses its link.
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| driver.run()));
                network.detach(vm);
                let link_error = match result {
                    Ok(Ok(())) => {
                        tracing::info!(vm = %name, "guest detached");
                        None
                    }
                    Ok(Err(LinkError::Closed)) => {
                        tracing::info!(vm = %name, reason = %LinkError::Closed, "guest detached");
                        None
                    }
                    Ok(Err(error)) => {
                        let why = WithCauses(&error).to_string();
                        tracing::warn!(vm = %name, reason = why, "guest detached");
                        Some(why)
                    }
                    Err(_) => {
                        let why = "the guest's driver failed; its link is closed";
                        tracing::error!(vm = %name, "{why}");
                        Some(why.to_owned())
                    }
                };
                let _ = network.reports.blocking_send(Report::VmDown { vm, link_error });
                then();
            })?;
        Ok(thread)
    }

    /// A guest's part in the capture of all.
    fn tap_of_file(&self, name: &str) -> Option<Tap> {
        let capture = self.capture_file.get()?;
        let tap = capture.tap(name);
        if tap.is_none() {
            tracing::warn!(
                vm = name,
                limit = INTERFACES_MAX,
                "not captured: the file has as many VMs as it may"
            );
        }
        tap
    }

    /// How a guest's engine asks upstream; the answer comes back as an input of its driver.
    fn resolve_for(self: &Arc<Self>, vm: VmId) -> Ask {
        let network = Arc::downgrade(self);
        let runtime = self.runtime.clone();
        let resolver = self.resolver.for_guest();
        Box::new(move |query, bytes, descriptor| {
            let (network, resolver) = (network.clone(), resolver.clone());
            runtime.spawn(async move {
                let answer = match resolver.resolve(bytes).await {
                    Ok(answer) => Some(answer),
                    Err(error) => {
                        tracing::debug!(%error, "no upstream answer");
                        None
                    }
                };
                drop(descriptor);
                if let Some(network) = network.upgrade() {
                    network.count_resolver();
                    network.send(vm, Input::Resolved { query, answer });
                }
            });
        })
    }

    /// Waits for a place in the session's queue on a guest's behalf, which comes as an input of its driver.
    pub(crate) fn await_turn(self: &Arc<Self>, vm: VmId, reports: Sender<Report>) {
        let network = Arc::downgrade(self);
        self.runtime.spawn(async move {
            let turn = reports.reserve_owned().await.ok();
            if let Some(network) = network.upgrade() {
                network.send(vm, Input::Turn(turn));
            }
        });
    }

    fn count_leases(&self, counts: LeaseCounts) {
        let LeaseCounts {
            exhausted,
            declined,
            claims_refused,
            limited,
        } = counts;
        let refusals = &self.config.metrics.lease_refusals;
        refusals.of(LeaseRefusal::Exhausted).raise_to(exhausted);
        refusals.of(LeaseRefusal::Declined).raise_to(declined);
        refusals.of(LeaseRefusal::Claim).raise_to(claims_refused);
        refusals.of(LeaseRefusal::Limit).raise_to(limited);
    }

    fn count_resolver(&self) {
        let (metrics, counts) = (&self.config.metrics, self.resolver.counts());
        let so_far = |count: &AtomicU64| count.load(Ordering::Relaxed);
        metrics.resolver_questions.raise_to(so_far(&counts.questions));
        metrics.resolver_over_tcp.raise_to(so_far(&counts.over_tcp));
        let faults = &metrics.resolver_faults;
        faults.of(ResolverFault::Busy).raise_to(so_far(&counts.busy));
        faults
            .of(ResolverFault::Unanswered)
            .raise_to(so_far(&counts.unanswered));
        faults
            .of(ResolverFault::Mismatched)
            .raise_to(so_far(&counts.mismatched));
    }

    fn detach(&self, vm: VmId) {
        let mut guests = self.write_guests();
        guests.by_vm.remove(&vm);
        guests.by_mac.retain(|_, owner| *owner != vm);
        drop(guests);
        self.lock_leases().release_vm(vm);
        self.lock_claims().release_vm(vm);
        for other in self.vms() {
            self.send(other, Input::GuestGone(vm));
        }
    }

    /// Tells, once for each guest, that it uses an address which it cannot have: what it sends from there is dropped,
    /// and looks from inside like a network that is down.
    fn tell_of_address(&self, vm: VmId, mac: Mac, address: Ipv4Addr) {
        let holder = self.lock_leases().owner(address);
        let guests = self.read_guests();
        let Some(guest) = guests.by_vm.get(&vm) else {
            return;
        };
        if guest.told_of_address.swap(true, Ordering::Relaxed) {
            return;
        }
        let whose = match holder.and_then(|holder| guests.by_vm.get(&holder)) {
            Some(other) => format!("VM {} has it", other.name),
            None => "it is kept for another MAC address, or is none of guests".to_owned(),
        };
        tracing::warn!(
            vm = guest.name,
            %mac,
            %address,
            "a VM uses an address that it cannot have, so nothing from there passes ({whose}; have it ask by DHCP, or \
             give it another)"
        );
    }

    /// Ends every guest, those included whose link is gone; no more are let in.
    pub fn stop(&self) {
        self.write_guests().stopped = true;
        for vm in self.vms() {
            self.send(vm, Input::Stop);
        }
    }

    /// Passes a frame to the guest that has a MAC address, or to all for broadcast and multicast. The
    /// address becomes its destination.
    ///
    /// # Errors
    /// Why it was not passed on, to one that should have had it.
    pub fn switch(&self, from: VmId, to: Mac, frame: &[u8]) -> Result<(), DropReason> {
        let guests = self.read_guests();
        let pass = |guest: &Guest| {
            if !guest.switch_open.load(Ordering::Relaxed) {
                return Err(DropReason::GuestToGuest);
            }
            let mut frame: Box<[u8]> = frame.into();
            if let Some(destination) = frame.first_chunk_mut() {
                *destination = to.0;
            }
            guest.put(Passed::Frame(frame))
        };
        if to.is_unicast() {
            let vm = guests
                .by_mac
                .get(&to)
                .filter(|vm| **vm != from)
                .ok_or(DropReason::UnknownStation)?;
            return guests.by_vm.get(vm).map_or(Err(DropReason::UnknownStation), pass);
        }
        for (vm, guest) in &guests.by_vm {
            if *vm != from {
                // One guest's closed port or full queue is no reason to keep the frame from the others.
                let _ = pass(guest);
            }
        }
        Ok(())
    }

    /// Hands what belongs to a flow between two guests to the other one.
    ///
    /// # Errors
    /// Why it was not taken.
    pub(crate) fn pass(&self, to: VmId, passed: Passed) -> Result<(), DropReason> {
        let guests = self.read_guests();
        guests
            .by_vm
            .get(&to)
            .map_or(Err(DropReason::UnknownStation), |guest| guest.put(passed))
    }

    /// Changes the zones. Lookups go on with those that there were until the next ones stand in their place.
    fn change_zones<R>(&self, change: impl FnOnce(&mut Zones) -> R) -> R {
        let _alone = self.zones_change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = Zones::clone(&Surroundings::zones(self));
        let result = change(&mut next);
        *self.zones.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
        result
    }

    fn lock_leases(&self) -> std::sync::MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_claims(&self) -> std::sync::MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_guests(&self) -> std::sync::RwLockReadGuard<'_, Guests> {
        self.guests.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_guests(&self) -> std::sync::RwLockWriteGuard<'_, Guests> {
        self.guests.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest {
    fn put(&self, passed: Passed) -> Result<(), DropReason> {
        if self.inbox.put(passed)? {
            let _ = self.waker.wake();
        }
        Ok(())
    }
}

impl Surroundings for Network {
    fn claim(&self, vm: VmId, mac: Mac, address: IpAddr, now: Time) -> bool {
        let owned = match address {
            IpAddr::V4(v4) => {
                let (owned, counts) = {
                    let mut leases = self.lock_leases();
                    (leases.claim(vm, mac, v4, now), leases.counts())
                };
                self.count_leases(counts);
                if !owned {
                    self.tell_of_address(vm, mac, v4);
                }
                owned
            }
            IpAddr::V6(v6) => {
                let mut claims = self.lock_claims();
                let owned = claims.claim(vm, mac, v6);
                let refusals = &self.config.metrics.lease_refusals;
                refusals.of(LeaseRefusal::ClaimIpv6).raise_to(claims.refused());
                owned
            }
        };
        if owned && let Some(forwards) = self.forwards.get() {
            forwards.guest_attached(vm, address);
        }
        owned
    }

    fn release(&self, vm: VmId, address: Ipv6Addr) {
        self.lock_claims().release(vm, address);
    }

    fn has_ipv6(&self) -> bool {
        self.guards.has_ipv6()
    }

    fn has_way(&self, dialled: IpAddr) -> bool {
        match dialled {
            IpAddr::V4(_) => true,
            // Without a default route there may be one to this place.
            IpAddr::V6(v6) => self.guards.has_ipv6() || way::has_way(v6),
        }
    }

    fn dhcp(&self, vm: VmId, mac: Mac, message: &[u8], now: Time) -> DhcpOutcome {
        let followed = self.followed_search();
        let (outcome, counts) = {
            let mut leases = self.lock_leases();
            let outcome = match followed {
                Some(search_domains) => {
                    let config = DhcpConfig {
                        search_domains,
                        ..self.config.dhcp.clone()
                    };
                    dhcp::handle(&mut leases, &config, vm, mac, message, now)
                }
                None => dhcp::handle(&mut leases, &self.config.dhcp, vm, mac, message, now),
            };
            (outcome, leases.counts())
        };
        self.count_leases(counts);
        if let (Some(address), Some(forwards)) = (outcome.bound, self.forwards.get()) {
            forwards.guest_attached(vm, address.into());
        }
        outcome
    }

    fn learn_mac(&self, vm: VmId, mac: Mac) -> bool {
        let is_kept = self.lock_leases().is_kept(mac);
        let mut guests = self.write_guests();
        let whose = match guests.by_mac.get(&mac) {
            Some(holder) if *holder == vm => return true,
            Some(holder) => {
                let holder = guests.by_vm.get(holder).map(|other| other.name.as_str());
                format!(
                    "VM {} has it; give one of the two another",
                    holder.unwrap_or("that is ending")
                )
            }
            None if is_kept && guests.by_vm.get(&vm).is_some_and(|guest| guest.without_kept) => {
                "a lease is kept for it, for a guest of the sockets of hypervisors; give it another"
                    .to_owned()
            }
            None => {
                guests.by_mac.insert(mac, vm);
                return true;
            }
        };
        if let Some(guest) = guests.by_vm.get(&vm)
            && !guest.told_of_mac.swap(true, Ordering::Relaxed)
        {
            let vm = &guest.name;
            tracing::warn!(vm, %mac, "a VM has a MAC address that it cannot have, so nothing of it passes ({whose})");
        }
        false
    }

    fn neighbour(&self, address: IpAddr) -> Option<Neighbour> {
        let (vm, mac) = match address {
            IpAddr::V4(v4) => self.lock_leases().holder(v4)?,
            IpAddr::V6(v6) => self.lock_claims().holder(v6)?,
        };
        let guests = self.read_guests();
        let open = guests.by_vm.get(&vm)?.switch_open.load(Ordering::Relaxed);
        Some(Neighbour { vm, mac, open })
    }

    fn guards(&self, dialled: SocketAddr, protocol: Protocol) -> GuardSet {
        self.guards.classify(dialled.ip(), dialled.port(), protocol)
    }

    fn followed_search(&self) -> Option<Vec<vnet_proto::model::Name>> {
        let file = self.config.follow_search.as_ref()?;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        Some(file.now().search_domains.clone())
    }

    fn zones(&self) -> Arc<Zones> {
        Arc::clone(&self.zones.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let metrics = &self.config.metrics;
        let (leases, faults) = (&metrics.lease_refusals, &metrics.resolver_faults);
        let links = &metrics.link_refusals;
        vec![
            (
                "network_lease_exhausted",
                leases.of(LeaseRefusal::Exhausted).get(),
            ),
            ("network_lease_declined", leases.of(LeaseRefusal::Declined).get()),
            (
                "network_lease_claim_refused",
                leases.of(LeaseRefusal::Claim).get(),
            ),
            (
                "network_lease_claim_ipv6_refused",
                leases.of(LeaseRefusal::ClaimIpv6).get(),
            ),
            ("network_lease_limit", leases.of(LeaseRefusal::Limit).get()),
            ("network_link_limit", links.of(LinkRefusal::Limit).get()),
            ("network_link_handshake", links.of(LinkRefusal::Handshake).get()),
            ("network_link_unnamed", links.of(LinkRefusal::Unnamed).get()),
            ("network_link_unknown", links.of(LinkRefusal::Unknown).get()),
            ("network_link_further", links.of(LinkRefusal::Further).get()),
            ("network_link_system", links.of(LinkRefusal::System).get()),
            ("network_link_back", metrics.links_back.get()),
            ("network_link_given_up", metrics.links_given_up.get()),
            ("network_resolver_questions", metrics.resolver_questions.get()),
            ("network_resolver_over_tcp", metrics.resolver_over_tcp.get()),
            ("network_resolver_busy", faults.of(ResolverFault::Busy).get()),
            (
                "network_resolver_unanswered",
                faults.of(ResolverFault::Unanswered).get(),
            ),
            (
                "network_resolver_mismatched",
                faults.of(ResolverFault::Mismatched).get(),
            ),
        ]
    }
}

impl Router for Network {
    fn send(&self, vm: VmId, input: Input) -> bool {
        let guests = self.read_guests();
        let Some(guest) = guests.by_vm.get(&vm) else {
            return false;
        };
        if let Input::Order(Order::Settings(settings)) = &input {
            guest.switch_open.store(settings.switch_open, Ordering::Relaxed);
        }
        let sent = guest.inputs.send(input).is_ok();
        let _ = guest.waker.wake();
        sent
    }

    fn broadcast(&self, order: &Order) -> Vec<VmId> {
        self.vms()
            .into_iter()
            .filter(|vm| self.send(*vm, Input::Order(order.clone())))
            .collect()
    }

    fn vms(&self) -> Vec<VmId> {
        self.guests
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .by_vm
            .keys()
            .copied()
            .collect()
    }

    fn guest_at(&self, address: IpAddr) -> Option<VmId> {
        match address {
            IpAddr::V4(v4) => self.lock_leases().owner(v4),
            IpAddr::V6(v6) => self.lock_claims().holder(v6).map(|(vm, _)| vm),
        }
    }

    fn seek(&self, address: IpAddr) -> bool {
        let IpAddr::V4(v4) = address else { return false };
        if !may_be_a_guests(v4, &self.config.subnet, self.config.gateway, &self.config.nat) {
            return false;
        }
        let asked = self.vms().into_iter().map(|vm| self.send(vm, Input::Seek(v4)));
        // Each of them, not only the first.
        asked.fold(false, |any, one| any | one)
    }

    fn is_open(&self) -> bool {
        let guests = self.read_guests();
        let mut all = guests.by_vm.values();
        all.all(|guest| guest.switch_open.load(Ordering::Relaxed))
    }
}

impl session::Zones for Network {
    fn zones(&self) -> Vec<Zone> {
        Surroundings::zones(self).list().to_vec()
    }

    fn set_zone(&self, zone: Zone) -> Result<(), session::Refusal> {
        Ok(self.change_zones(|zones| zones.set(zone))?)
    }

    fn merge_zone(&self, zone: Zone) -> Result<Zone, session::Refusal> {
        Ok(self.change_zones(|zones| zones.merge(zone))?)
    }

    fn remove_records(
        &self,
        name: Option<&vnet_proto::model::Name>,
        records: &[ZoneRecord],
    ) -> Result<Zone, session::Refusal> {
        Ok(self.change_zones(|zones| zones.remove_records(name, records))?)
    }

    fn delete_zone(&self, name: Option<&vnet_proto::model::Name>) -> Result<(), session::Refusal> {
        self.change_zones(|zones| zones.remove(name))
            .map(drop)
            .ok_or_else(|| {
                let text = format!("there is no zone {}", vnet_proto::model::zone_text(name));
                session::Refusal::new(tonic::Code::NotFound, text)
            })
    }
}

impl session::Captures for Network {
    fn start_capture(
        &self,
        vm: VmId,
        spec: CaptureSpec,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<Arc<Capture>, session::Refusal> {
        let limit = |text: String| session::Refusal::new(tonic::Code::ResourceExhausted, text);
        let gone = || session::Refusal::new(tonic::Code::NotFound, "there is no guest of this handle");
        let name = {
            let guests = self.guests.read().unwrap_or_else(PoisonError::into_inner);
            guests
                .by_vm
                .get(&vm)
                .map(|guest| guest.name.clone())
                .ok_or_else(gone)?
        };
        // Held to the end, so that two at once do not both find the last place.
        let mut captures = self.captures.lock().unwrap_or_else(PoisonError::into_inner);
        captures.retain(|(_, capture)| capture.upgrade().is_some_and(|capture| capture.end().is_none()));
        let of_all = usize::from(self.capture_file.get().is_some_and(|file| file.end().is_none()));
        if captures.len() + of_all >= CAPTURES_PER_NETWORK_MAX {
            return Err(limit(format!(
                "the network has {CAPTURES_PER_NETWORK_MAX} captures already; end one of them"
            )));
        }
        let of_guest = captures.iter().filter(|(captured, _)| *captured == vm).count();
        if of_guest + of_all >= CAPTURES_PER_GUEST_MAX {
            return Err(limit(format!(
                "VM {name} has {CAPTURES_PER_GUEST_MAX} captures already; end one of them"
            )));
        }
        let capture = Capture::new(spec, wake);
        let tap = capture.tap(&name).ok_or_else(gone)?;
        if !self.send(vm, Input::Capture(tap)) {
            return Err(gone());
        }
        captures.push((vm, Arc::downgrade(&capture)));
        Ok(capture)
    }
}

impl From<ZoneError> for session::Refusal {
    fn from(error: ZoneError) -> Self {
        let code = match error {
            ZoneError::TooMany | ZoneError::TooLarge(_) | ZoneError::TooManyPatterns(_) => {
                tonic::Code::ResourceExhausted
            }
            ZoneError::NoZone(_) | ZoneError::NoRecord(_) => tonic::Code::NotFound,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::egress::resolver::{ResolverConfig, Upstreams};
    use crate::leases::LeaseConfig;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 127, 1);
    /// The MAC address that 192.168.127.6 is kept for.
    pub(crate) const KEPT: Mac = Mac([2, 0, 0, 0, 0, 6]);

    /// A network without guests, for tests.
    pub(crate) fn network(reports: Sender<Report>) -> Arc<Network> {
        network_of(reports, 1500, Duration::ZERO)
    }

    /// One with another MTU, and another time for which a guest without a link is kept. It keeps a lease for [`KEPT`].
    pub(crate) fn network_of(reports: Sender<Report>, mtu_bytes: u16, grace: Duration) -> Arc<Network> {
        let subnet: Ipv4Net = "192.168.127.0/29".parse().unwrap();
        let lease_time = Duration::from_secs(3600);
        let config = NetworkConfig {
            gateway: GATEWAY,
            gateway_mac: Mac([0x5a, 0x94, 0xef, 0xe4, 0x0c, 0xdd]),
            subnet,
            nat: Arc::default(),
            ipv6: None,
            mtu_bytes: mtu_bytes.into(),
            dhcp: DhcpConfig {
                gateway: GATEWAY,
                subnet,
                dns: vec![GATEWAY],
                mtu_bytes,
                search_domains: Vec::new(),
                lease_time,
            },
            follow_search: None,
            hold: Duration::from_secs(30),
            grace,
            flows_max: 16,
            descriptors: Descriptors::new(8_192),
            metrics: Arc::default(),
        };
        let leases = Leases::new(LeaseConfig {
            subnet,
            reserved: vec![GATEWAY],
            first: None,
            fixed: [(KEPT, Ipv4Addr::new(192, 168, 127, 6))].into(),
            lease_time,
        });
        let resolver = Resolver::new(ResolverConfig {
            upstreams: Upstreams::Fixed(Vec::new()),
            never: Vec::new(),
            in_flight_max: 0,
            total_time: Duration::from_secs(1),
        });
        let guards = Arc::new(Guards::new(crate::guards::HostAddresses::default(), []));
        let runtime = tokio::runtime::Handle::current();
        Network::new(
            config,
            leases,
            Zones::default(),
            guards,
            resolver,
            runtime,
            reports,
        )
    }

    /// Takes all addresses from a guest.
    pub(crate) fn release(network: &Network, vm: VmId) {
        network.lock_leases().release_vm(vm);
    }

    pub(crate) fn counter(network: &Network, wanted: &str) -> u64 {
        let counters = Surroundings::counters(network);
        counters.iter().find(|(name, _)| *name == wanted).unwrap().1
    }

    #[tokio::test]
    async fn lookups_do_not_wait_for_a_change_of_zones() {
        let (reports, _receiver) = tokio::sync::mpsc::channel(16);
        let network = network(reports);
        let zone = |name: &str| Zone::read(name, [["host", "", "10.0.0.1"]].into_iter(), "").unwrap();
        network.change_zones(|zones| zones.set(zone("a.test"))).unwrap();
        network.change_zones(|zones| {
            zones.set(zone("b.test")).unwrap();
            let (sender, seen) = std::sync::mpsc::channel();
            let other = Arc::clone(&network);
            std::thread::spawn(move || sender.send(Surroundings::zones(&*other).list().len()));
            assert_eq!(
                seen.recv_timeout(Duration::from_secs(5)),
                Ok(1),
                "those that there were"
            );
        });
        assert_eq!(Surroundings::zones(&*network).list().len(), 2);
    }

    #[tokio::test]
    async fn what_guests_share_is_counted_for_all_of_them() {
        let (reports, _receiver) = tokio::sync::mpsc::channel(16);
        let network = network(reports);
        let mac = |n| Mac([2, 0, 0, 0, 0, n]);
        let address = IpAddr::from([192, 168, 127, 2]);
        assert!(network.claim(VmId(1), mac(1), address, Time::ZERO));
        assert!(!network.claim(VmId(2), mac(2), address, Time::ZERO));
        assert_eq!(counter(&network, "network_lease_claim_refused"), 1);
        let address = "fd00::2".parse().unwrap();
        assert!(network.claim(VmId(1), mac(1), address, Time::ZERO));
        assert!(!network.claim(VmId(2), mac(2), address, Time::ZERO));
        assert_eq!(counter(&network, "network_lease_claim_ipv6_refused"), 1);
        assert_eq!(Router::guest_at(&*network, address), Some(VmId(1)));
        let refusals = &network.config.metrics.lease_refusals;
        assert_eq!(
            refusals.of(LeaseRefusal::Claim).get(),
            1,
            "the dataplane's metrics have it too"
        );

        // No room for any question.
        let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x04test\x00\x00\x01\x00\x01";
        let share = network.config.descriptors.attach(VmId(1)).unwrap();
        let descriptor = share.take().descriptor.unwrap();
        network.resolve_for(VmId(1))(7, query.to_vec(), descriptor);
        while counter(&network, "network_resolver_busy") == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(counter(&network, "network_resolver_questions"), 0);
    }
}

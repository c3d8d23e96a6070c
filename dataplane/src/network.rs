//! What guests of one network share, off the fast path: leases, zones, guards, the switch's inboxes,
//! and who is there.

mod orders;
mod surroundings;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender as InputSender;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime};
use std::{io, thread};

use ipnet::Ipv4Net;
use mio::Waker;
use tokio::sync::mpsc::Sender;
use vnet_proto::model::VmId;

use crate::capture::{Capture, INTERFACES_MAX, Tap};
use crate::causes::WithCauses;
use crate::claims::Claims;
use crate::clock;
use crate::descriptors::Descriptors;
use crate::driver::{Ask, Driver, DriverParts};
use crate::egress::resolver::Resolver;
use crate::egress::resolver::host::ResolvConf;
use crate::engine::discovery::Ipv6Config;
use crate::engine::frame::DropReason;

use crate::engine::gateway::dhcp::DhcpConfig;
use crate::engine::gateway::dns::zones::Zones;
use crate::engine::nat::Nat;
use crate::engine::switch::Passed;
use crate::engine::{Engine, EngineConfig, Surroundings, Time};
use crate::forward::Forwards;
use crate::front::FrontSender;
use crate::guards::Guards;
use crate::inbox::Inbox;
use crate::leases::Leases;
use crate::link::serve::Berth;
use crate::link::{Link, LinkError};
use crate::mac::Mac;
use crate::message::{Input, OwnPolicy, Report, Router, VmUp};
use crate::metrics::Metrics;

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

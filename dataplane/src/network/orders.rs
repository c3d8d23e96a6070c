//! What the session and forwards ask of a network: inputs handed to guests, its zones, captures.

use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use vnet_proto::model::VmId;

use super::Network;
use crate::capture::{CAPTURES_PER_GUEST_MAX, CAPTURES_PER_NETWORK_MAX, Capture, CaptureSpec};
use crate::engine::Surroundings;
use crate::engine::gateway::dns::zones::ZoneError;
use crate::engine::nat::may_be_a_guests;
use crate::message::{Input, Order, Router};
use crate::session;
use crate::zone::{Zone, ZoneRecord};

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

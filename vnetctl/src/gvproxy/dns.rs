//! Names, as the dataplane is told of them: the zones that it brings along, and where its search domains are from.

use std::path::Path;

use vnet_proto::model::{Name, zone_text};

use super::config::{Record, Stack, Zone};
use crate::launch::{HostResolver, RESOLV_CONF, ZoneRecordSettings, ZoneSettings};

/// Search domains of the host's resolver now, as many as guests take.
pub fn host_search_domains() -> Vec<Name> {
    HostResolver::read(Path::new(RESOLV_CONF)).search_domains
}

impl Stack {
    /// The zones as the dataplane takes them, in order: these, and no default ones.
    pub fn zone_settings(&self) -> Vec<ZoneSettings> {
        let record = |record: &Record| ZoneRecordSettings {
            name: record.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            regexp: record.regexp.clone().unwrap_or_default(),
            address: record.ip.map(|ip| ip.to_string()).unwrap_or_default(),
        };
        let zone = |zone: &Zone| ZoneSettings {
            name: zone_text(zone.name.as_ref()).to_owned(),
            records: zone.records.iter().map(record).collect(),
            default_address: zone.default_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        };
        self.dns.iter().map(zone).collect()
    }

    /// The values of the dataplane's `--dns-search`: where they are the host's, it follows those as they change.
    pub fn search_flags(&self) -> Vec<String> {
        if self.dns_search_follows_host {
            return vec!["host".to_owned()];
        }
        // With its last dot none of them is taken for that word.
        self.dns_search_domains
            .iter()
            .map(|name| format!("{name}."))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use vnet_dataplane::args::Cli;
    use vnet_dataplane::config::{Config as DataplaneConfig, SearchDomains, VmSettings};

    use super::*;
    use crate::gvproxy::{Config, FileConfig, Flags};

    fn stack(arguments: &[&str], file: &str) -> Stack {
        let flags = Flags::parse(arguments.iter().map(Into::into)).unwrap();
        let (file, _) = FileConfig::parse("c.yaml", file, true).unwrap();
        let host = super::super::config::Host {
            search_domains: &["corp.example".parse().unwrap()],
            exists: &|_| Ok(false),
            is_no_directory: &|_| false,
        };
        Config::resolve(&flags, file, &host).unwrap().0.stack
    }

    /// What a dataplane makes of it.
    fn taken(stack: &Stack) -> DataplaneConfig {
        let mut line = vec!["vnet-dataplane".to_owned(), "--controlplane=fd://3".to_owned()];
        line.push("--link-fd=4".to_owned());
        line.extend(
            stack
                .search_flags()
                .iter()
                .map(|domain| format!("--dns-search={domain}")),
        );
        let settings = VmSettings {
            zones: Some(stack.zone_settings()),
            ..VmSettings::default()
        };
        DataplaneConfig::new(&Cli::try_parse_from(line).unwrap().args, settings, "n").unwrap()
    }

    #[test]
    fn zones_and_search_domains_reach_the_dataplane_as_they_are() {
        let file = "stack:\n  dns:\n    - {name: ., records: [{name: \"7\", regexp: \"^a,/=b\"}, {name: x.y, ip: \"fd00::1\"}]}\n\
                    \x20   - {name: b.test., defaultIP: 10.0.0.9}\n  dnsSearchDomains: [host, a.test.]\n";
        let stack = stack(&["-config=c.yaml", "-listen-stdio=accept"], file);
        let network = taken(&stack).network;

        let zones: Vec<&str> = network.zones.iter().map(|zone| zone.text()).collect();
        assert_eq!(zones, [".", "b.test"]);
        assert_eq!(
            network.zones[0].records[0].owner.pattern().unwrap().as_str(),
            "^a,/=b"
        );
        assert_eq!(network.zones[0].records[0].address, None);
        assert_eq!(
            network.zones[0].records[1].address,
            Some("fd00::1".parse().unwrap())
        );
        assert_eq!(
            network.zones[1].default_address,
            Some("10.0.0.9".parse().unwrap())
        );
        let domains = ["host".parse().unwrap(), "a.test".parse().unwrap()];
        assert_eq!(network.search, SearchDomains::These(domains.to_vec()));
    }

    #[test]
    fn without_a_file_the_hosts_search_domains_are_followed_and_with_one_there_may_be_no_zone() {
        let legacy = stack(&["-listen-stdio=accept"], "");
        assert_eq!(legacy.dns_search_domains, ["corp.example".parse().unwrap()]);
        let network = taken(&legacy).network;
        assert_eq!(network.search, SearchDomains::Host);
        assert_eq!(network.zones.len(), 2);

        let empty = stack(&["-config=c.yaml", "-listen-stdio=accept"], "log-level: info\n");
        assert!(taken(&empty).network.zones.is_empty());
        assert_eq!(taken(&empty).network.search, SearchDomains::These(Vec::new()));
    }
}

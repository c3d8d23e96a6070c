//! A policy that a run could rewrite: its file and its lists, where the command may write to them or to a
//! directory that leads there.
//!
//! It changes nothing for this run, which has read them before the command starts and reads them no more. But
//! whoever gives the same file to the next run gives it what this one left there.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access, geteuid};

use crate::launch::Document;

/// A warning, if a policy's file or one of its lists can be written from inside. `writable` are the real paths of
/// where alone the command may write, if that is said.
pub(super) fn warning(policy: &Path, document: &Document, writable: Option<&[PathBuf]>) -> Option<String> {
    if policy == Path::new("-") {
        return None;
    }
    let beside = policy.parent().unwrap_or(Path::new(""));
    let lists = document.lists.iter().map(|list| beside.join(&list.path));
    let exposed = std::iter::once(policy.to_owned())
        .chain(lists)
        .find(|path| path.canonicalize().is_ok_and(|real| is_exposed(&real, writable)))?;
    let remedy = match writable {
        None => "--write PATH makes all else read-only",
        Some(_) => "keep it elsewhere than below what --write names",
    };
    Some(format!(
        "warning: {} can be written from inside this run; it was read once and is not read again, so look at it before \
         it is used next ({remedy})",
        exposed.display()
    ))
}

/// Whether a file can be written, or another be put in its place.
fn is_exposed(real: &Path, writable: Option<&[PathBuf]>) -> bool {
    let may = |path: &Path| {
        writable.is_none_or(|places| places.iter().any(|place| path.starts_with(place)))
            && access(path, AccessFlags::W_OK).is_ok()
    };
    let replaceable = |(entry, directory): (&Path, &Path)| may(directory) && may_take_out(entry, directory);
    may(real) || real.ancestors().zip(real.ancestors().skip(1)).any(replaceable)
}

/// Whether who may write to a directory may take an entry out of it: of a sticky one only what is his.
fn may_take_out(entry: &Path, directory: &Path) -> bool {
    const STICKY: u32 = 0o1000;
    let owner = |path: &Path| std::fs::symlink_metadata(path).map(|m| (m.mode(), m.uid())).ok();
    let me = geteuid();
    match (owner(directory), owner(entry)) {
        (Some((mode, keeper)), Some((_, owner))) => {
            mode & STICKY == 0 || me.is_root() || [keeper, owner].contains(&me.as_raw())
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vnet-exposed-{}-{name}", std::process::id()));
            std::fs::create_dir_all(path.join("work")).unwrap();
            Self(path.canonicalize().unwrap())
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn with_list() -> Document {
        let list = vnet_proto::v1::PolicyList {
            path: "lists/bad.txt".to_owned(),
            ..Default::default()
        };
        Document {
            lists: vec![list],
            ..Document::default()
        }
    }

    #[test]
    fn a_policy_that_the_run_may_write_is_warned_about_and_one_out_of_its_reach_is_not() {
        let place = Place::new("policy");
        let policy = place.0.join("policy.yaml");
        std::fs::write(&policy, "version: 1\n").unwrap();
        let work = vec![place.0.join("work")];
        let told = warning(&policy, &Document::default(), None).unwrap();
        assert!(
            told.contains("policy.yaml can be written from inside this run"),
            "{told}"
        );
        assert!(told.contains("--write PATH"), "{told}");
        assert_eq!(warning(&policy, &Document::default(), Some(&work)), None);
        let all = vec![place.0.clone()];
        assert!(
            warning(&policy, &Document::default(), Some(&all))
                .unwrap()
                .contains("elsewhere")
        );
        assert_eq!(warning(Path::new("-"), &Document::default(), None), None);
    }

    #[test]
    fn a_list_of_it_counts_as_well() {
        let place = Place::new("list");
        let policy = place.0.join("policy.yaml");
        let lists = place.0.join("lists");
        std::fs::write(&policy, "version: 1\n").unwrap();
        std::fs::create_dir_all(&lists).unwrap();
        std::fs::write(lists.join("bad.txt"), "a.test\n").unwrap();
        let told = warning(&policy, &with_list(), Some(std::slice::from_ref(&lists))).unwrap();
        assert!(told.contains("lists/bad.txt can be written"), "{told}");
    }

    #[test]
    fn a_file_that_is_read_only_in_a_directory_that_is_not_can_be_replaced() {
        let place = Place::new("replaced");
        let policy = place.0.join("work").join("policy.yaml");
        std::fs::write(&policy, "version: 1\n").unwrap();
        let mut permissions = std::fs::metadata(&policy).unwrap().permissions();
        permissions.set_readonly(true);
        std::fs::set_permissions(&policy, permissions).unwrap();
        assert!(warning(&policy, &Document::default(), None).is_some());
    }
}

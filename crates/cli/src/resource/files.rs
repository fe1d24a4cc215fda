//! From what `-f` names to resources: a file, a folder of `.yaml` and `.yml` files, or standard input.

use crate::failure::{Failure, Outcome};
use crate::resource::node::{FileError, Node};
use crate::resource::{Kind, Resource};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Largest file that is read, in bytes: the most resources of one apply, each with a full page of rules.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Most files of one folder, so that a mistyped path such as `/` ends soon.
const FILES_MAX: usize = 1_000;
/// Most resources of one apply; a controller takes no more at once.
pub(crate) const RESOURCES_MAX: usize = 1_000;

/// Everything that the paths hold, in the order of the paths and the files' names.
///
/// # Errors
/// The first thing that is wrong; nothing was sent anywhere.
pub(crate) fn load(paths: &[PathBuf]) -> Outcome<Vec<Resource>> {
    let mut resources = Vec::new();
    for path in paths {
        for (name, text) in texts(path)? {
            for node in Node::parse_all(&name, &text).map_err(|error| unusable(&error))? {
                resources.push(Resource::read(node).map_err(|error| unusable(&error))?);
            }
        }
    }
    let seen = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    if resources.is_empty() {
        return Err(Failure::fault(format!("there is no resource in {seen}"))
            .next("write one, for example as in docs/resources.md"));
    }
    if resources.len() > RESOURCES_MAX {
        let what = format!("{} resources are more than the {RESOURCES_MAX} of one apply", resources.len());
        return Err(Failure::fault(what).next("apply them in parts"));
    }
    unique(&resources)?;
    Ok(resources)
}

fn unusable(error: &FileError) -> Failure {
    Failure::fault(error.to_string())
        .next("mend the file; `weft check -f FILE` tells whether it is right now. Nothing was changed")
}

fn unique(resources: &[Resource]) -> Outcome<()> {
    let mut seen: BTreeMap<(Kind, &str), &Resource> = BTreeMap::new();
    for resource in resources {
        if let Some(first) = seen.insert((resource.kind, &resource.name), resource) {
            let message = format!("is there twice, first in {}", first.explain("", "").place);
            return Err(unusable(&resource.explain("", &message)));
        }
    }
    Ok(())
}

/// The files that a path stands for: names for messages, and contents.
fn texts(path: &Path) -> Outcome<Vec<(String, String)>> {
    if path == Path::new("-") {
        let mut text = String::new();
        let input = std::io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        input.map_err(|error| Failure::fault(format!("standard input cannot be read: {error}")))?;
        return Ok(vec![("<stdin>".to_owned(), bounded("standard input", text)?)]);
    }
    let unreadable = |error: std::io::Error| {
        let what = format!("{} cannot be read: {error}", path.display());
        Failure::fault(what).next("name a file, a folder with .yaml files, or - for standard input")
    };
    if !fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Ok(vec![(path.display().to_string(), read(path)?)]);
    }
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let file = entry.map_err(unreadable)?.path();
        let is_yaml = file.extension().is_some_and(|ending| ending == "yaml" || ending == "yml");
        if is_yaml && file.is_file() {
            files.push(file);
        }
        if files.len() > FILES_MAX {
            return Err(Failure::fault(format!("{} has more than {FILES_MAX} files", path.display())));
        }
    }
    files.sort();
    files.into_iter().map(|file| Ok((file.display().to_string(), read(&file)?))).collect()
}

fn read(file: &Path) -> Outcome<String> {
    let name = file.display().to_string();
    let unreadable = |error: std::io::Error| Failure::fault(format!("{name} cannot be read: {error}"));
    let mut text = String::new();
    let opened = fs::File::open(file).map_err(unreadable)?;
    opened.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
    bounded(&name, text)
}

fn bounded(name: &str, text: String) -> Outcome<String> {
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(Failure::fault(format!("{name} is larger than {} MiB", FILE_BYTES_MAX >> 20)));
    }
    Ok(text)
}
